"""From a position in the plan to a part of a batch: read, check, mask. This is what loader workers run.

Stage 0 yields work items for ever; the stages behind it fill one part each: consecutive rows of a rank's batch,
in memory laid out once. Nothing here depends on how many workers or ranks there are, except which rows a part has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from beit_dist.data import counts, shared_memory
from beit_dist.data.draws import Purpose, uniforms, words
from beit_dist.data.fetching import Extent, RemoteReader
from beit_dist.data.lookahead import Lookahead, MakeLookahead
from beit_dist.data.manifest import Manifest
from beit_dist.data.masking import MaskGenerator
from beit_dist.data.plan import Piece, Plan
from beit_dist.data.sample import NPY_HEADER, SampleLayout, decode_head, parse_key, sample_crc
from beit_dist.data.storage import ShardReader
from beit_dist.errors import DataError, SampleError, UserError

_ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs


@dataclass(frozen=True)
class RowLayout:
    """Where the arrays of ``rows`` samples lie in one run of bytes, so that a part is one piece of memory.

    Args:
        sample: shapes of patches and tokens.
        positions: K, the length of a row of masked positions.
        depth: blocks with drop-path keeps; 0 leaves them out.
        rows: samples.
    """

    sample: SampleLayout
    positions: int
    depth: int
    rows: int

    @cached_property
    def fields(self) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
        """Name to (offset in bytes, dtype, shape).

        ``stamp`` is the batch that the memory was last filled for: it tells whether a part was overwritten while
        it was copied.
        """
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "patches": (torch.uint8, (self.rows, self.sample.patches, self.sample.patch_bytes)),
            "tokens": (torch.int16, (self.rows, self.sample.patches)),
            "positions": (torch.int16, (self.rows, self.positions)),
            "sample_ids": (torch.int64, (self.rows,)),
            "epochs": (torch.int32, (self.rows,)),
            "stamp": (torch.int64, (1,)),
        }
        if self.depth:
            shapes["keeps"] = (torch.uint8, (self.rows, self.depth, 2))
        placed, offset = {}, 0
        for name, (dtype, shape) in shapes.items():
            placed[name] = (offset, dtype, shape)
            offset += -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        return placed

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole, padding included."""
        offset, dtype, shape = list(self.fields.values())[-1]
        return offset + -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """The arrays as views of ``memory``, a uint8 tensor of at least ``nbytes``."""
        return {
            name: memory[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
            for name, (offset, dtype, shape) in self.fields.items()
        }


@dataclass
class Part:
    """Consecutive rows of one rank's batch, on their way through the stages."""

    consumed: int
    """Samples of each lane before this batch."""
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


def split_rows(rows: range, per_lane: int, parts: int) -> list[range]:
    """Cut a rank's rows into at most ``parts`` consecutive ranges of whole lanes, as even as lanes allow."""
    first, last = rows.start // per_lane, (rows.stop - 1) // per_lane + 1
    parts = min(parts, last - first)
    edges = [(first + (last - first) * part // parts) * per_lane for part in range(parts + 1)]
    edges[0], edges[-1] = rows.start, rows.stop
    return [range(edges[part], edges[part + 1]) for part in range(parts)]


def drop_path_depth(rates: Sequence[float]) -> int:
    """Blocks for which keeps are drawn: all of them, or none if nothing is ever dropped."""
    return len(rates) if any(rates) else 0


class PartPipeline(wds.DataPipeline):  # type: ignore[misc]  # webdataset has no types
    """The endless stream of parts of one rank; each worker of a loader yields those of its own part number.

    Its state is the position it has come to: ``{"consumed": samples of each lane}``.

    Args:
        reader: reads the shards.
        manifest: names and layout of the shards.
        plan: the order of samples.
        masks: makes the masked positions.
        drop_path_rates: stochastic-depth rate of each block; all zero leaves out the keeps.
        parts: the rows of the global batch that each worker fills.
        per_lane: samples of each lane in a batch.
        consumed: where to begin.
        slots: pieces of memory that each worker fills in turn. A part must have been copied by the time its worker
            is asked for the part ``slots`` later.
        tolerant: carry damaged samples with weight 0, and report them, instead of failing at the first.
        ahead: what a reader that can hold samples is told to hold.
    """

    def __init__(
        self,
        *,
        reader: ShardReader,
        manifest: Manifest,
        plan: Plan,
        masks: MaskGenerator,
        drop_path_rates: Sequence[float],
        parts: Sequence[range],
        per_lane: int,
        consumed: int,
        slots: int,
        tolerant: bool,
        ahead: MakeLookahead | None = None,
    ) -> None:
        super().__init__(self._work, wds.map(self._read), wds.map(self._mask), wds.map(self._keep))
        self.reader, self.plan, self.masks, self.tolerant = reader, plan, masks, tolerant
        self.parts, self.per_lane, self.consumed, self.slots = list(parts), per_lane, consumed, slots
        self.rates = np.repeat(np.asarray(drop_path_rates, np.float64), 2).reshape(-1, 2)
        self.depth = drop_path_depth(drop_path_rates)
        self.shard_names = [[shard.name for shard in manifest.view_shards(v)] for v in range(manifest.views)]
        self.sample = manifest.layout
        self.ahead = ahead
        self._layouts: dict[int, RowLayout] = {}
        self.memory: Tensor | None = None
        """Memory for the next part, in place of the slots: used without workers."""

    def layout(self, rows: int) -> RowLayout:
        """How a part of so many rows lies in memory."""
        if rows not in self._layouts:
            self._layouts[rows] = RowLayout(self.sample, self.masks.positions_per_image, self.depth, rows)
        return self._layouts[rows]

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]

    def __iter__(self) -> Iterator[Part | Failure]:
        sent: set[int] = set()
        in_worker = get_worker_info() is not None
        self._look_ahead()
        try:
            for part in super().__iter__():
                part.counts = counts.take() if in_worker else {}
                yield replace(part, memory=None) if part.slot in sent else part
                sent.add(part.slot)
        except UserError as error:
            yield Failure(type(error), str(error))
        finally:
            if self._ahead is not None:
                self._ahead.close()

    def _look_ahead(self) -> None:
        """Begin anew to say what is read next, if the reader listens and this process reads at all."""
        self._ahead: Lookahead | None = None
        if self.ahead is not None and isinstance(self.reader, RemoteReader):
            self._ahead = self.ahead(self.reader, self.plan, self._extent, self._rows(), self.per_lane)

    def _rows(self) -> range:
        """Rows of the global batch that this process fills."""
        worker = get_worker_info()
        return self.parts[0 if worker is None else worker.id]

    # -------------------------------------------------------------------------------------------- the stages

    def _work(self) -> Iterator[Part]:
        """Stage 0: this worker's part of one batch after the other."""
        rows = self._rows()
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
            self._arrays(part)["stamp"][0] = part.consumed
            self.consumed += self.per_lane  # the state counts this part as yielded, and it is about to be
            yield part

    def _read(self, part: Part) -> Part:
        """Stage 1: patches, tokens and ids of each row, straight from the shards into the part's memory."""
        picks = self.plan.picks(part.consumed, self.per_lane, part.rows)
        arrays = self._arrays(part)
        arrays["epochs"][:] = picks.epochs
        reading, ahead = _Reading(self.reader, self.sample), self._ahead
        memory, size = arrays["patches"].data.cast("B"), self.sample.patches_nbytes
        places = zip(picks.views.tolist(), picks.shards.tolist(), picks.rows.tolist(), strict=True)
        if ahead is not None:
            ahead.begin(part.consumed)
        for row, (view, shard, stored) in enumerate(places):
            if ahead is not None:
                lane, number = divmod(part.rows[row], self.per_lane)
                ahead.reach(lane, part.consumed + number)
            patches, tokens = memory[row * size : (row + 1) * size], arrays["tokens"][row]
            try:
                name = self.shard_names[view][shard]
                arrays["sample_ids"][row] = reading.sample(name, stored, view, patches, tokens)
            except DataError as error:
                if not self.tolerant:
                    raise
                part.faults.append(str(error))
                arrays["sample_ids"][row] = -1
                arrays["patches"][row], tokens[:] = 0, 0
        return part

    def _mask(self, part: Part) -> Part:
        """Stage 2: the masked positions of each row; none where the sample is damaged."""
        arrays = self._arrays(part)
        keys = zip(arrays["epochs"].tolist(), arrays["sample_ids"].tolist(), strict=True)
        for row, (epoch, sample_id) in enumerate(keys):
            arrays["positions"][row] = self.masks.positions(epoch, sample_id) if sample_id >= 0 else -1
        return part

    def _keep(self, part: Part) -> Part:
        """Stage 3: which residual branches of each block are kept for each row."""
        arrays = self._arrays(part)
        if "keeps" in arrays:
            epochs, ids, seed = arrays["epochs"].tolist(), arrays["sample_ids"].tolist(), self.plan.seed
            drawn = [words(seed, Purpose.DROP_PATH, key, self.rates.size) for key in zip(epochs, ids, strict=True)]
            kept = uniforms(np.stack(drawn)).reshape(-1, *self.rates.shape) >= self.rates
            arrays["keeps"][:] = kept
        return part

    def _arrays(self, part: Part) -> dict[str, NDArray[Any]]:
        assert part.memory is not None  # only what is sent away loses it
        tensors = self.layout(len(part.rows)).tensors(part.memory)
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def _extent(self, piece: Piece) -> Extent:
        """Where the samples of a piece lie."""
        stride = self.sample.stride
        return Extent(self.shard_names[piece.view][piece.shard], piece.row * stride, piece.rows, stride)


class _Reading:
    """Reads samples with one call each, and checks every byte that training depends on."""

    def __init__(self, reader: ShardReader, layout: SampleLayout) -> None:
        self.reader, self.layout = reader, layout
        # What lies before the patches, and between them and the tokens; the arrays go where they belong.
        self.head = memoryview(bytearray(layout.patches_start))
        between = layout.tokens_start - layout.patches_start - layout.patches_nbytes
        self.between = memoryview(bytearray(between))

    def sample(self, shard: str, row: int, view: int, patches: memoryview, tokens: NDArray[np.int16]) -> int:
        """Read a sample into ``patches`` and ``tokens``; its id. A failed read is repeated once.

        Raises:
            SampleError: naming shard, row, offset and cause, after the second failure.
        """
        try:
            return self._attempt(shard, row, view, patches, tokens)
        except DataError:
            pass  # bytes can be damaged on their way, too
        try:
            sample_id = self._attempt(shard, row, view, patches, tokens, fresh=True)
        except DataError as error:
            counts.read_again.add("damaged")
            raise SampleError(
                f"{shard}, sample {row}, byte {row * self.layout.stride}: damaged, also when read again: {error}. "
                "check_shards.py tells how much is; loader.bad_samples=N trains around up to N such samples."
            ) from None
        counts.read_again.add("whole")
        return sample_id

    def _attempt(
        self,
        shard: str,
        row: int,
        view: int,
        patches: memoryview,
        tokens: NDArray[np.int16],
        fresh: bool = False,
    ) -> int:
        layout = self.layout
        token_bytes = tokens.data.cast("B")
        buffers = (self.head, patches, self.between, token_bytes)
        self.reader.read_into(shard, row * layout.stride, buffers, fresh=fresh)
        stored, key = decode_head(layout, self.head)
        crc = sample_crc(key, patches, token_bytes)
        if crc != stored:
            raise DataError(f"{key}: got crc32 {crc:08x}, expected {stored:08x}")
        if self.between[-NPY_HEADER:] != layout.tokens_npy_header:
            raise DataError(f"{key}: got another tokens npy header than {layout.tokens_npy_header!r}")
        highest = int(tokens.view(np.uint16).max())  # as unsigned numbers, negative ones are high too
        if highest >= layout.vocabulary:
            raise DataError(f"{key}: got token {highest}, expected tokens below {layout.vocabulary}")
        key_view, sample_id = parse_key(key)
        if key_view != view:
            raise DataError(f"{key}: got a sample of view {key_view}, expected view {view}")
        return sample_id
