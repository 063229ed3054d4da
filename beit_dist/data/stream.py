"""The trainer's side of loading: workers' parts become one rank batch after another, one step ahead."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import queue
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from beit_dist.config import LoaderConfig, near_divisors
from beit_dist.data import counts, shared_memory
from beit_dist.data.block_cache import BlockCache
from beit_dist.data.digest import rows_digest
from beit_dist.data.fetching import RemoteReader
from beit_dist.data.lookahead import BlocksAhead, MakeLookahead, SamplesAhead, lanes_of, ring_bytes
from beit_dist.data.manifest import Manifest
from beit_dist.data.masking import MaskGenerator
from beit_dist.data.pipeline import Failure, Part, PartPipeline, RowLayout, drop_path_depth, split_rows
from beit_dist.data.plan import Plan
from beit_dist.data.sample import SampleLayout
from beit_dist.data.storage import ShardReader, open_reader
from beit_dist.data.workers import WorkerStart, start_method
from beit_dist.errors import ConfigError, SampleError, UserError
from beit_dist.storage.access import Access

logger = logging.getLogger(__name__)

_BUFFERS = 3  # one with the trainer, one it may still copy from, one being filled
_PATIENCE = 5.0  # seconds that close() gives workers to end by themselves
_MADE_OF = ("sample_ids", "epochs", "positions", "keeps")  # what of a row its digest is of
_LOOK = 0.5  # seconds without a batch between two looks whether to go on waiting


@dataclass
class RankBatch:
    """A rank's R rows of one optimizer step, lane-major: CPU tensors, valid until the 2nd ``__next__`` after."""

    consumed: int
    """Samples of each lane before this step."""
    patches: Tensor
    """uint8 (R, patches, patch_bytes)."""
    tokens: Tensor
    """int16 (R, patches)."""
    positions: Tensor
    """int16 (R, K): masked patches, ascending, padded with -1; a damaged sample has -1 only."""
    keeps: Tensor | None
    """uint8 (R, depth, 2): 1 keeps a block's residual branch, 0 drops it; None without drop path."""
    sample_ids: Tensor
    """int64 (R,); -1 where the sample is damaged."""
    epochs: Tensor
    """int32 (R,)."""
    masked: int
    """Number of positions >= 0."""
    bad: int
    """Damaged samples among the rows."""
    digest: int
    """Of the rows' samples, epochs, masks and drop-path keeps: 64 bits, those of all ranks add up (mod 2⁶⁴)."""
    wait_seconds: float
    """How long ``__next__`` had to wait for this batch."""


def shared_memory_bytes(
    *, layout: SampleLayout, positions: int, rank_rows: int, loader: LoaderConfig, depth: int = 0
) -> int:
    """Bytes of /dev/shm that a rank's loader holds at most.

    Args:
        layout: shapes of a sample.
        positions: masked positions of a sample, padding included.
        rank_rows: samples of a rank's batch.
        loader: how many steps are read ahead.
        depth: blocks with drop-path keeps.
    """
    if not loader.workers:
        return 0
    step = RowLayout(layout, positions, depth, rank_rows).nbytes
    return shared_memory.held_bytes(step, loader.prefetch)


def ring_of(plan: Plan, layout: SampleLayout, rows: range, per_lane: int) -> int:
    """Bytes of the blocks that a rank holds which reads a URL.

    Args:
        plan: the order of samples.
        layout: shapes of a sample.
        rows: of the global batch, the rank's.
        per_lane: samples of each lane in a batch.
    """
    return ring_bytes(
        lanes=len(lanes_of(rows, per_lane)),
        window_blocks=plan.window_blocks,
        block_samples=plan.block_samples,
        stride=layout.stride,
    )


def look_ahead(
    reader: ShardReader, plan: Plan, layout: SampleLayout, rows: range, per_lane: int, loader: LoaderConfig
) -> MakeLookahead | None:
    """How far the reader of a rank's rows looks ahead: by blocks if they fit into ``loader.memory_gib``."""
    if not isinstance(reader, RemoteReader):
        return None  # the system's own cache holds what is read of files
    fits = ring_of(plan, layout, rows, per_lane) <= loader.memory_gib * 2**30
    return BlocksAhead if fits else SamplesAhead


@dataclass
class _Buffer:
    """Memory of one rank batch, used again and again: faulting in fresh pages costs more than reading."""

    memory: Tensor
    tensors: dict[str, Tensor]


class RankBatches(Iterator[RankBatch]):
    """This rank's batches from a position on, for ever.

    Args:
        root: the data set's folder, or its URL.
        manifest: of that data set.
        plan: the order of samples; its seed keys drop path.
        masks: makes the masked positions.
        drop_path_rates: stochastic-depth rate of each block of the model.
        global_batch: samples of one step over all ranks; a multiple of the plan's lanes and of ``world``.
        rank: this rank.
        world: number of ranks.
        consumed: samples of each lane that were consumed before.
        loader: workers, prefetch, budget of damaged samples, time limit.
        pin: put batches into page-locked memory, for asynchronous copies to a GPU.
        ranks_on_node: ranks that share this node's /dev/shm.
        access: how a URL is reached.

    Raises:
        ConfigError: the global batch does not divide.
        SpaceError: /dev/shm is too small.
    """

    def __init__(
        self,
        *,
        root: str,
        manifest: Manifest,
        plan: Plan,
        masks: MaskGenerator,
        drop_path_rates: Sequence[float],
        global_batch: int,
        rank: int,
        world: int,
        consumed: int,
        loader: LoaderConfig,
        pin: bool = False,
        ranks_on_node: int = 1,
        access: Access | None = None,
    ) -> None:
        _check_division(global_batch, plan.lanes, world)
        self.root, self.loader, self.consumed = root, loader, consumed
        self.per_lane = global_batch // plan.lanes
        self.rows = range(rank * global_batch // world, (rank + 1) * global_batch // world)
        parts = split_rows(self.rows, self.per_lane, max(1, loader.workers))
        self.workers = len(parts) if loader.workers else 0
        layout = RowLayout(
            manifest.layout, masks.positions_per_image, drop_path_depth(drop_path_rates), len(self.rows)
        )
        self.prefetch = self._prefetch(layout.nbytes, ranks_on_node)
        reader = open_reader(root, access)
        ahead = look_ahead(reader, plan, manifest.layout, self.rows, self.per_lane, loader)
        if loader.cache_dir is not None and isinstance(reader, RemoteReader) and ahead is BlocksAhead:
            reader.cache = BlockCache(loader.cache_dir, int(loader.cache_gib * 2**30), manifest.digest)
            reader.cache.remove_leftovers()
        self._pipeline = PartPipeline(
            reader=reader,
            manifest=manifest,
            plan=plan,
            masks=masks,
            drop_path_rates=drop_path_rates,
            parts=parts,
            per_lane=self.per_lane,
            consumed=consumed,
            # The loader asks a worker for a part when it hands out the one `prefetch` before it. The one before
            # that has been copied by then.
            slots=self.prefetch + 1,
            tolerant=loader.bad_samples > 0,
            ahead=ahead,
        )
        self._slots: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
        if rank == 0:
            self._give_notice(plan.lanes, world, by_sample=ahead is SamplesAhead)
        self.bad = 0
        self._held: deque[_Buffer] = deque()
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[RankBatch, _Buffer] | BaseException] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            memory = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pin)
            self._free.put(_Buffer(memory, layout.tensors(memory)))
        self._stopped, self._word = multiprocessing.Pipe(duplex=False)
        self._closing = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()
        # Registered after multiprocessing's own exit function and so run before it, which would wait for ever for
        # workers that ignore SIGTERM.
        atexit.register(self.close)

    # ------------------------------------------------------------------------------- in the trainer's thread

    def __next__(self) -> RankBatch:
        """The next batch.

        Raises:
            SampleError: a sample is damaged beyond the budget, a worker died, or nothing came in time.
        """
        batch = self.next_unless(lambda: False)
        if batch is None:
            raise StopIteration
        return batch

    def next_unless(self, interrupted: Callable[[], bool]) -> RankBatch | None:
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
        made: tuple[RankBatch, _Buffer] | BaseException | None = None
        while made is None:
            left = self.loader.timeout_seconds - (time.perf_counter() - began)
            try:
                made = self._ready.get(timeout=min(_LOOK, max(0.0, left)))
            except queue.Empty:
                if interrupted():
                    return None
                if left <= _LOOK:
                    made = SampleError(
                        f"{self.root}: no batch within loader.timeout_seconds={self.loader.timeout_seconds:g}. The"
                        " storage does not answer or is too slow; raise the limit if that is expected."
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
            consumed = self.consumed
            while (buffer := self._free.get()) is not None and not self._closing:
                batch = self._assemble(parts, buffer, consumed)
                if batch is None:
                    break
                consumed += self.per_lane
                self._check_state(loader.state_dict(), consumed)
                self._ready.put((batch, buffer))
        except BaseException as error:
            self._ready.put(_explained(error))
        finally:
            self._pipeline.reader.close()  # without workers, this thread has read

    def _open_loader(self) -> Any:
        # Always a fresh loader at an integer: one path for starting and for resuming, on any number of workers.
        workers: dict[str, Any] = {}
        if self.workers:
            workers = {
                "prefetch_factor": self.prefetch,
                "multiprocessing_context": start_method(),
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

    def _assemble(self, parts: Iterator[Part | Failure], buffer: _Buffer, consumed: int) -> RankBatch | None:
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
        self._count_bad(faults)
        tensors = buffer.tensors
        made_of = [tensors[name].numpy() for name in _MADE_OF if name in tensors]
        return RankBatch(
            consumed=consumed,
            keeps=tensors.get("keeps"),
            masked=int((tensors["positions"].numpy() >= 0).sum()),
            bad=len(faults),
            digest=rows_digest(self.rows.start, *made_of),
            wait_seconds=0.0,
            **{name: tensors[name] for name in ("patches", "tokens", "positions", "sample_ids", "epochs")},
        )

    def _copy(self, part: Part, buffer: _Buffer) -> None:
        slot = (part.rows.start, part.slot)
        if part.memory is not None:
            tensors = self._pipeline.layout(len(part.rows)).tensors(part.memory)
            self._slots[slot] = {name: tensor.numpy() for name, tensor in tensors.items()}
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
            raise RuntimeError(f"the loader yielded up to {states}, expected {expected} samples of each lane")

    def _count_bad(self, faults: list[str]) -> None:
        for fault in faults:
            self.bad += 1
            if self.bad > self.loader.bad_samples:
                raise SampleError(
                    f"{fault} This is number {self.bad}; loader.bad_samples={self.loader.bad_samples}."
                )
            logger.warning("damaged sample %d of %d allowed: %s", self.bad, self.loader.bad_samples, fault)

    # ---------------------------------------------------------------------------------------------- at start

    def _prefetch(self, step_bytes: int, ranks_on_node: int) -> int:
        available = shared_memory.room(ranks_on_node)
        if not self.workers or available is None:
            return self.loader.prefetch
        return shared_memory.fit_prefetch(self.loader.prefetch, step_bytes, available)

    def _give_notice(self, lanes: int, world: int, by_sample: bool) -> None:
        if self.workers < self.loader.workers:
            logger.warning(
                "loader.workers: %d reduced to %d, as a rank has no more lanes", self.loader.workers, self.workers
            )
        if self.prefetch < self.loader.prefetch:
            logger.warning(
                "loader.prefetch: %d reduced to %d to fit into %s",
                self.loader.prefetch,
                self.prefetch,
                shared_memory.SHARED_MEMORY,
            )
        if lanes % world:
            logger.warning(
                "%d ranks do not divide %d lanes: exact, but ranks read some blocks twice", world, lanes
            )
        if by_sample:
            logger.warning(
                "loader.memory_gib: %g is too little for the blocks of this rank's lanes; %s is read by sample,"
                " which is slower. Raise it, or lower loader.window_blocks",
                self.loader.memory_gib,
                self.root,
            )


def _check_division(global_batch: int, lanes: int, world: int) -> None:
    if global_batch % world:
        raise ConfigError(
            "global_batch",
            global_batch,
            f"a multiple of the {world} ranks",
            f"Near by: ranks {near_divisors(global_batch, world)}, or a global batch of"
            f" {global_batch // world * world or world}.",
        )
    if global_batch % lanes:
        raise ConfigError("global_batch", global_batch, f"a multiple of the run's {lanes} lanes")


def _explained(error: BaseException) -> BaseException:
    """What torch and the system say when a worker was killed, in our words; anything else as it is."""
    lost = isinstance(error, (OSError, EOFError)) or "exited unexpectedly" in str(error)
    if "AF_UNIX path too long" in str(error):  # of the fork server's socket; Linux allows 107 bytes
        error = ConfigError(
            "TMPDIR",
            tempfile.gettempdir(),
            "a path of at most about 60 characters, for the sockets of the loader's processes",
            "Set it to a shorter one, such as /tmp.",
        )
    elif lost and not isinstance(error, UserError):
        cause = str(error) or type(error).__name__
        error = SampleError(
            f"a loader worker was killed ({cause}). Most often that is the system's memory running out, or"
            f" {shared_memory.SHARED_MEMORY}; lower loader.workers or loader.prefetch, and start again to go on."
        )
    if isinstance(error, UserError):
        error.__traceback__ = None  # its frames would keep the loader, and with it the workers, alive
    return error
