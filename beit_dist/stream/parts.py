"""Parts of a rank's batches: what loader workers fill, in memory that is laid out once and used again.

Nothing here depends on how many workers or ranks there are, except which rows a part has.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from beit_dist.draws import Integers, Purpose, uniforms, words_of
from beit_dist.errors import UserError
from beit_dist.stream import counts, shared_memory

_ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class MemoryLayout:
    """Where the arrays of some samples lie in one run of bytes, so that a part is one piece of memory.

    Besides those given, there is ``stamp``, the batch that the memory was last filled for: it tells whether a part
    was overwritten while it was copied.

    Args:
        shapes: dtype and shape of each array.

    Attributes:
        fields: name to (offset in bytes, dtype, shape).
        nbytes: bytes of the whole, padding included.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.fields: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self.nbytes = 0
        for name, (dtype, shape) in {**shapes, "stamp": (torch.int64, (1,))}.items():
            self.fields[name] = (self.nbytes, dtype, shape)
            self.nbytes += -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """The arrays as views of ``memory``, a uint8 tensor of at least ``nbytes``."""
        return {
            name: memory[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
            for name, (offset, dtype, shape) in self.fields.items()
        }

    def arrays(self, memory: Tensor) -> dict[str, NDArray[Any]]:
        """The same for NumPy."""
        return {name: tensor.numpy() for name, tensor in self.tensors(memory).items()}


@dataclass
class Part:
    """Consecutive rows of one rank's batch, on their way through the stages."""

    consumed: int
    """The position before this batch."""
    rows: range
    """Rows of the global batch."""
    slot: int
    """Which of its worker's pieces of memory this part is in."""
    memory: Tensor | None
    """uint8, laid out by a :class:`RowLayout` of as many rows; None if the receiver has this slot already."""
    faults: list[str] = field(default_factory=list)
    """What was wrong with each damaged sample; their rows have positions of -1 only."""
    counts: counts.Taken = field(default_factory=dict)
    """What the worker has counted since the part before, for its rank to count."""


@dataclass(frozen=True)
class Failure:
    """An error a user can act on, sent in place of a part: an exception would arrive wrapped in tracebacks."""

    kind: type[UserError]
    text: str


def drop_path_depth(rates: Sequence[float]) -> int:
    """Blocks for which keeps are drawn: all of them, or none if nothing is ever dropped."""
    return len(rates) if any(rates) else 0


class DropPath:
    """Which residual branches of each block are kept: keyed by seed, epoch and sample.

    Args:
        seed: of the run.
        rates: stochastic-depth rate of each block.
    """

    def __init__(self, seed: int, rates: Sequence[float]) -> None:
        self._seed = seed
        self._rates = np.repeat(np.asarray(rates, np.float64), 2).reshape(-1, 2)

    def keeps(self, epochs: Integers, samples: Integers) -> NDArray[np.bool_]:
        """``(samples, depth, 2)``; epochs and samples are ``(samples,)``."""
        drawn = words_of(self._seed, Purpose.DROP_PATH, (epochs, samples), self._rates.size)
        kept: NDArray[np.bool_] = uniforms(drawn).reshape(-1, *self._rates.shape) >= self._rates
        return kept


class Parts(wds.DataPipeline):  # type: ignore[misc]  # webdataset has no types
    """The endless stream of parts of one rank; each worker of a loader yields those of its own part number.

    Its state is the position it has come to: ``{"consumed": ...}``.

    Args:
        stages: fill a part, one after another.
        parts: the rows of the global batch that each worker fills.
        advance: how far a batch moves the position.
        consumed: where to begin.
        slots: pieces of memory that each worker fills in turn. A part must have been copied by the time its worker
            is asked for the part ``slots`` later.
    """

    def __init__(
        self,
        *stages: Callable[[Part], Part],
        parts: Sequence[range],
        advance: int,
        consumed: int,
        slots: int,
    ) -> None:
        super().__init__(self._work, *map(wds.map, stages))
        self.parts, self.advance, self.consumed, self.slots = list(parts), advance, consumed, slots
        self._arrays: dict[
            int, dict[str, NDArray[Any]]
        ] = {}  # by address, as making them takes longer than many reads
        self.memory: Tensor | None = None
        """Memory for the next part, in place of the slots: used without workers."""

    @abstractmethod
    def layout(self, rows: int) -> MemoryLayout:
        """How a part of so many rows lies in memory."""

    def begin(self) -> None:
        """This process will yield parts."""

    def end(self) -> None:
        """It yields no more."""

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]

    def __iter__(self) -> Iterator[Part | Failure]:
        sent: set[int] = set()
        in_worker = get_worker_info() is not None
        self.begin()
        try:
            for part in super().__iter__():
                part.counts = counts.take() if in_worker else {}
                yield replace(part, memory=None) if part.slot in sent else part
                sent.add(part.slot)
        except UserError as error:
            yield Failure(type(error), str(error))
        finally:
            self.end()

    @property
    def rows(self) -> range:
        """Rows of the global batch that this process fills."""
        worker = get_worker_info()
        return self.parts[0 if worker is None else worker.id]

    def arrays(self, part: Part) -> dict[str, NDArray[Any]]:
        """A part's arrays."""
        assert part.memory is not None  # only what is sent away loses it
        address = part.memory.data_ptr()
        if address not in self._arrays:
            self._arrays[address] = self.layout(len(part.rows)).arrays(part.memory)
        return self._arrays[address]

    def _work(self) -> Iterator[Part]:
        """Stage 0: this worker's part of one batch after the other."""
        rows = self.rows
        kept: dict[int, Tensor] = {}
        for slot in itertools.cycle(range(self.slots)):
            if self.memory is not None:
                memory = self.memory
            elif slot not in kept:
                # Filling fresh pages costs more than reading and checking, so there are only so many of them.
                memory = kept[slot] = shared_memory.allocate(self.layout(len(rows)).nbytes)
            else:
                memory = kept[slot]
            part = Part(self.consumed, rows, slot, memory)
            self.arrays(part)["stamp"][0] = part.consumed
            self.consumed += self.advance  # the state counts this part as yielded, and it is about to be
            yield part
