"""A rank's loader: workers fill parts, a thread joins them to one batch after another, a few steps ahead."""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import tempfile
import threading
import time
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from beit_dist.errors import ConfigError, SampleError, UserError
from beit_dist.stream import counts, shared_memory
from beit_dist.stream.parts import Failure, Part, Parts
from beit_dist.stream.workers import WorkerStart, start_method

_BUFFERS = 3  # one with the trainer, one it may still copy from, one being filled
_PATIENCE = 5.0  # seconds that close() gives workers to end by themselves
_LOOK = 0.5  # seconds without a batch between two looks whether to wait longer


class Waited(Protocol):
    """A batch."""

    wait_seconds: float
    """How long the caller waited for it."""


Batch = TypeVar("Batch", bound=Waited)


@dataclass
class _Buffer:
    """Memory of one rank batch, used again and again: faulting in fresh pages costs more than reading."""

    memory: Tensor
    tensors: dict[str, Tensor]


class Loading(Iterator[Batch], Generic[Batch]):
    """A rank's batches from a position on, for ever. Whoever derives from it calls :meth:`start` once all is set.

    Args:
        pipeline: makes the parts; as many workers run it as it has parts, if there are any.
        workers: processes; 0 works in the loader's thread.
        prefetch: how many steps they are ahead.
        rows: of the global batch, the rank's.
        timeout_seconds: how long the caller waits for a batch.
        where: what is read, for messages.
        pin: put batches into page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        pipeline: Parts,
        *,
        workers: int,
        prefetch: int,
        rows: range,
        timeout_seconds: float,
        where: str,
        pin: bool = False,
    ) -> None:
        self._pipeline, self.workers, self.prefetch, self.rows = pipeline, workers, prefetch, rows
        self._timeout, self._where = timeout_seconds, where
        self._slots: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
        self._held: deque[_Buffer] = deque()
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Batch, _Buffer] | BaseException] = queue.SimpleQueue()
        layout = pipeline.layout(len(rows))
        for _ in range(_BUFFERS):
            memory = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pin)
            self._free.put(_Buffer(memory, layout.tensors(memory)))
        self._stopped, self._word = multiprocessing.Pipe(duplex=False)
        self._closing = False
        self._failed: BaseException | None = None

    def start(self) -> None:
        """Begin to load."""
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()
        # Registered after multiprocessing's own exit function and so run before it, which would wait for ever for
        # workers that ignore SIGTERM.
        atexit.register(self.close)

    @abstractmethod
    def make(self, tensors: dict[str, Tensor], consumed: int, faults: list[str]) -> Batch:
        """The batch that was loaded.

        Args:
            tensors: its arrays.
            consumed: the position before it.
            faults: what was wrong with damaged samples.
        """

    def ended(self) -> None:
        """The loader's thread ends: close what it has opened."""

    # ------------------------------------------------------------------------------- in the trainer's thread

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            SampleError: a sample is damaged beyond the budget, a worker died, or nothing came in time.
        """
        batch = self.next_unless(lambda: False)
        if batch is None:
            raise StopIteration
        return batch

    def next_unless(self, interrupted: Callable[[], bool]) -> Batch | None:
        """The next batch; None if ``interrupted()``, which is asked only while there is none, or after close().

        Raises:
            SampleError: as ``__next__``.
        """
        if self._failed is not None:
            raise self._failed
        if self._closing:
            return None
        if len(self._held) == _BUFFERS - 1:
            self._free.put(self._held.popleft())
        began = time.perf_counter()
        made: tuple[Batch, _Buffer] | BaseException | None = None
        while made is None:
            left = self._timeout - (time.perf_counter() - began)
            try:
                made = self._ready.get(timeout=min(_LOOK, max(0.0, left)))
            except queue.Empty:
                if interrupted():
                    return None
                if left <= _LOOK:
                    made = SampleError(
                        f"{self._where}: no batch within loader.timeout_seconds={self._timeout:g}. The"
                        " storage does not answer or is too slow. If that is expected, raise the limit."
                    )
        if isinstance(made, BaseException):
            self._failed = made
            raise made
        batch, buffer = made
        batch.wait_seconds = time.perf_counter() - began
        self._held.append(buffer)
        return batch

    def close(self) -> None:
        """End thread and workers; may be called more than once, and returns even if a worker hangs."""
        self._closing = True
        self._free.put(None)
        self._thread.join(_PATIENCE)
        self._word.close()  # workers that still run end at once
        self._thread.join(_PATIENCE)
        atexit.unregister(self.close)

    # ------------------------------------------------------------------------------- in the loader's thread

    def _run(self) -> None:
        try:
            loader = self._open_loader()
            parts = iter(loader)
            consumed = self._pipeline.consumed
            while (buffer := self._free.get()) is not None and not self._closing:
                batch = self._assemble(parts, buffer, consumed)
                if batch is None:
                    break
                consumed += self._pipeline.advance
                self._check_state(loader.state_dict(), consumed)
                self._ready.put((batch, buffer))
        except BaseException as error:
            self._ready.put(_explained(error))
        finally:
            self.ended()

    def _open_loader(self) -> Any:
        # Always a fresh loader at an integer: one path for starting and for resuming, on any number of workers.
        workers: dict[str, Any] = {}
        if self.workers:
            workers = {
                "prefetch_factor": self.prefetch,
                "multiprocessing_context": start_method(type(self._pipeline).__module__),
                "worker_init_fn": WorkerStart(self._stopped),
            }
        # torchdata calls what torch has deprecated; nothing a user could do about it.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            self._pipeline,
            batch_size=None,
            num_workers=self.workers,
            # Without one, creating the iterator draws from the global generator, which belongs to the trainer.
            generator=torch.Generator(),
            **workers,
        )

    def _assemble(self, parts: Iterator[Part | Failure], buffer: _Buffer, consumed: int) -> Batch | None:
        """Fill ``buffer`` with the parts of one step; None if it was told to stop."""
        self._pipeline.memory = None if self.workers else buffer.memory
        faults: list[str] = []
        for _ in range(max(1, self.workers)):
            if self._closing:
                return None
            part = next(parts)
            if isinstance(part, Failure):
                raise part.kind(part.text)
            if self.workers:
                self._copy(part, buffer)
            counts.give(part.counts)
            faults += part.faults
        return self.make(buffer.tensors, consumed, faults)

    def _copy(self, part: Part, buffer: _Buffer) -> None:
        slot = (part.rows.start, part.slot)
        if part.memory is not None:
            self._slots[slot] = self._pipeline.layout(len(part.rows)).arrays(part.memory)
        rows = slice(part.rows.start - self.rows.start, part.rows.stop - self.rows.start)
        arrays = self._slots[slot]
        for name, array in arrays.items():
            # NumPy copies in this thread; torch would take the threads the model computes with.
            buffer.tensors[name].numpy()[... if name == "stamp" else rows] = array
        if arrays["stamp"][0] != part.consumed:
            raise RuntimeError(f"a worker filled memory for {arrays['stamp'][0]} while {part.consumed} was copied")

    def _check_state(self, state: dict[str, Any], expected: int) -> None:
        """The loader's own account of what it yielded must be the position we believe to be at."""
        if self.workers:
            states = [worker["dataset_state"] for worker in state["_snapshot"]["_worker_snapshots"].values()]
        else:
            states = [state["dataset_state"]]
        if any(own != {"consumed": expected} for own in states):
            raise RuntimeError(f"the loader yielded up to {states}, expected {expected}")


def fitting_prefetch(wanted: int, step_bytes: int, ranks_on_node: int) -> int:
    """How many steps up to ``wanted`` workers can be ahead within the rank's share of /dev/shm.

    Raises:
        SpaceError: not even one fits.
    """
    available = shared_memory.room(ranks_on_node)
    return wanted if available is None else shared_memory.fit_prefetch(wanted, step_bytes, available)


def _explained(error: BaseException) -> BaseException:
    """What torch and the system say of a killed worker, in our words; any other error as it is."""
    lost = isinstance(error, (OSError, EOFError)) or "exited unexpectedly" in str(error)
    if "AF_UNIX path too long" in str(error):  # of the fork server's socket; Linux allows 107 bytes
        error = ConfigError(
            "TMPDIR",
            tempfile.gettempdir(),
            "a path of at most about 60 characters: the loader's processes put sockets there",
            "Set it to a shorter path, such as /tmp.",
        )
    elif lost and not isinstance(error, UserError):
        cause = str(error) or type(error).__name__
        error = SampleError(
            f"a loader worker was killed ({cause}). Most often the memory of the host, or of"
            f" {shared_memory.SHARED_MEMORY}, ran out. Lower loader.workers or loader.prefetch, and start again."
        )
    if isinstance(error, UserError):
        error.__traceback__ = None  # its frames would keep the loader, and with it the workers, alive
    return error
