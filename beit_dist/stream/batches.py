"""A rank's batches of shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from beit_dist.config.pretraining import LoaderConfig
from beit_dist.config.reading import near_divisors
from beit_dist.errors import ConfigError, SampleError
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.access import Access
from beit_dist.stream import shared_memory
from beit_dist.stream.block_cache import BlockCache
from beit_dist.stream.digest import rows_digest
from beit_dist.stream.fetching import RemoteReader
from beit_dist.stream.held import look_ahead
from beit_dist.stream.loading import Loading, fitting_prefetch
from beit_dist.stream.lookahead import BlocksAhead, SamplesAhead
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.parts import drop_path_depth
from beit_dist.stream.pipeline import PartPipeline, RowLayout, split_rows
from beit_dist.stream.plan import Plan
from beit_dist.stream.readers import open_reader

logger = logging.getLogger(__name__)

_MADE_OF = ("sample_ids", "epochs", "positions", "keeps")  # what of a row its digest is of


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


class RankBatches(Loading[RankBatch]):
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
        masks: Masks,
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
        rows = range(rank * global_batch // world, (rank + 1) * global_batch // world)
        parts = split_rows(rows, self.per_lane, max(1, loader.workers))
        workers, prefetch = len(parts) if loader.workers else 0, loader.prefetch
        layout = RowLayout(manifest.layout, masks.positions_per_image, drop_path_depth(drop_path_rates), len(rows))
        if workers:
            prefetch = fitting_prefetch(prefetch, layout.nbytes, ranks_on_node)
        self._reader = open_reader(root, access)
        ahead = look_ahead(self._reader, plan, manifest.layout, rows, self.per_lane, loader)
        if loader.cache_dir is not None and isinstance(self._reader, RemoteReader) and ahead is BlocksAhead:
            self._reader.cache = BlockCache(loader.cache_dir, int(loader.cache_gib * 2**30), manifest.digest)
            self._reader.cache.remove_leftovers()
        pipeline = PartPipeline(
            reader=self._reader,
            manifest=manifest,
            plan=plan,
            masks=masks,
            drop_path_rates=drop_path_rates,
            parts=parts,
            per_lane=self.per_lane,
            consumed=consumed,
            # The loader asks a worker for a part when it hands out the one `prefetch` before it. The one before
            # that has been copied by then.
            slots=prefetch + 1,
            tolerant=loader.bad_samples > 0,
            ahead=ahead,
        )
        super().__init__(
            pipeline,
            workers=workers,
            prefetch=prefetch,
            rows=rows,
            timeout_seconds=loader.timeout_seconds,
            where=root,
            pin=pin,
        )
        if rank == 0:
            self._give_notice(plan.lanes, world, by_sample=ahead is SamplesAhead)
        self.bad = 0
        self.start()

    def make(self, tensors: dict[str, Tensor], consumed: int, faults: list[str]) -> RankBatch:
        """The batch; too many damaged samples are an error."""
        self._count_bad(faults)
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

    def ended(self) -> None:
        """Without workers, the loader's thread has read."""
        self._reader.close()

    def _count_bad(self, faults: list[str]) -> None:
        for fault in faults:
            self.bad += 1
            if self.bad > self.loader.bad_samples:
                raise SampleError(
                    f"{fault} That makes {self.bad}; loader.bad_samples allows {self.loader.bad_samples}."
                )
            logger.warning("damaged sample %d of %d allowed: %s", self.bad, self.loader.bad_samples, fault)

    def _give_notice(self, lanes: int, world: int, by_sample: bool) -> None:
        if self.workers < self.loader.workers:
            logger.warning(
                "loader.workers: %d reduced to %d, the number of lanes of a rank",
                self.loader.workers,
                self.workers,
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
                "%d ranks do not divide %d lanes: samples are the same, but ranks read some blocks twice",
                world,
                lanes,
            )
        if by_sample:
            logger.warning(
                "loader.memory_gib: %g is too little for the blocks of this rank's lanes. Samples of %s are read "
                "one by one, which is slower. Raise it, or lower loader.window_blocks",
                self.loader.memory_gib,
                self.root,
            )


def _check_division(global_batch: int, lanes: int, world: int) -> None:
    if global_batch % world:
        raise ConfigError(
            "global_batch",
            global_batch,
            f"a multiple of the {world} ranks",
            f"Try {near_divisors(global_batch, world)} ranks, or a global batch of"
            f" {global_batch // world * world or world}.",
        )
    if global_batch % lanes:
        raise ConfigError("global_batch", global_batch, f"a multiple of the run's {lanes} lanes")
