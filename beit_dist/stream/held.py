"""How much a rank's loader holds: of /dev/shm, and of blocks that are fetched ahead."""

from __future__ import annotations

from beit_dist.config.pretraining import LoaderConfig
from beit_dist.shards.sample import SampleLayout
from beit_dist.stream import shared_memory
from beit_dist.stream.fetching import RemoteReader
from beit_dist.stream.lookahead import BlocksAhead, MakeLookahead, SamplesAhead, lanes_of, ring_bytes
from beit_dist.stream.pipeline import RowLayout
from beit_dist.stream.plan import Plan
from beit_dist.stream.readers import ShardReader


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
