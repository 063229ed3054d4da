"""The real loader with real processes: whatever changes between two starts, the stream of samples goes on."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.http_files import HttpFiles
from support.stream_data import DataSet, Rows, assert_equal, joined

from beit_dist.shards.manifest import Manifest

EXAMPLES = int(os.environ.get("BEIT_STREAM_EXAMPLES", "5"))
"""How many streams are drawn; each starts processes, so few by default and hundreds for a long look."""


@dataclass(frozen=True)
class Start:
    """One start of a run: how many ranks and workers there are, and how they read."""

    per_lane: int
    """Samples of each lane in a batch: another one is another global batch."""
    world: int
    workers: int
    steps: int
    reader: str = "folder"
    """``folder``; ``blocks`` or ``samples`` fetched from a web server; ``cached``: blocks kept on a disk."""


@dataclass(frozen=True)
class Stream:
    """A data set, an order, and the starts that read it one after the other."""

    shards: tuple[int, ...]
    views: int
    gaps: int
    lanes: int
    block: int | None
    window: int
    consumed: int
    starts: tuple[Start, ...]


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    lanes = draw(st.integers(1, 5))
    starts = []
    for _ in range(draw(st.integers(1, 3))):
        per_lane = draw(st.integers(1, 4))
        batch = lanes * per_lane
        world = draw(st.sampled_from([world for world in range(1, 5) if batch % world == 0]))
        reader = draw(st.sampled_from(["folder", "blocks", "cached", "samples"]))
        starts.append(Start(per_lane, world, draw(st.integers(0, 2)), draw(st.integers(1, 4)), reader))
    shards = draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))
    views, gaps, window = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    block = draw(st.none() | st.integers(1, 6))
    return Stream(tuple(shards), views, gaps, lanes, block, window, draw(st.integers(0, 20)), tuple(starts))


TINY = Stream(
    shards=(3, 2),
    views=2,
    gaps=1,
    lanes=4,
    block=1,
    window=1,
    consumed=0,
    starts=(Start(2, 2, 2, 3, "blocks"), Start(1, 4, 1, 2, "cached"), Start(3, 3, 0, 2, "samples")),
)
"""A set smaller than the first global batch; then other batches, ranks, workers and readers."""


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stream=streams())
@example(stream=TINY)
def test_the_stream_goes_on_over_any_starts(stream: Stream, make_shards: Callable[..., Manifest]) -> None:
    with tempfile.TemporaryDirectory() as folder, HttpFiles(Path(folder)) as server:
        manifest = make_shards(folder, stream.shards, views=stream.views, gaps=stream.gaps)
        order = {"lanes": stream.lanes, "block_samples": stream.block, "window_blocks": stream.window}
        data = DataSet(Path(folder), manifest, **order)
        position, seen = stream.consumed, Counter[tuple[int, int]]()
        for start in stream.starts:
            for rows in read(data if start.reader == "folder" else data.at(server.url), start, position):
                assert_equal(rows, data.stored(position, stream.lanes * start.per_lane))
                seen.update(zip(rows["epochs"].tolist(), rows["sample_ids"].tolist(), strict=True))
                position += start.per_lane
    assert set(seen.values()) == {1}
    # Of an epoch that lies wholly between the first position and the last, every sample was there.
    samples, lanes = data.plan.samples, stream.lanes
    for epoch in range(-(-stream.consumed * lanes // samples), (position - 1) * lanes // samples):
        assert sum(number == epoch for number, _ in seen) == samples


def read(data: DataSet, start: Start, position: int) -> list[Rows]:
    """The global batches of one start, put together from all its ranks."""
    ranks = [
        data.take(
            start.steps,
            rank=rank,
            world=start.world,
            consumed=position,
            batch=data.plan.lanes * start.per_lane,
            workers=start.workers,
            memory_gib=1e-9 if start.reader == "samples" else 4,
            cache_dir=str(data.root / "cache") if start.reader == "cached" else None,
            cache_gib=50_000 / 2**30,  # a few blocks
        )
        for rank in range(start.world)
    ]
    return [joined([rank[step] for rank in ranks]) for step in range(start.steps)]
