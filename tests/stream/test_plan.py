"""The order of samples: exactly once, independent of ranks, resumable at one integer, pinned."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_dist.draws import Purpose, permutation
from beit_dist.errors import CheckpointError, ConfigError, DataError
from beit_dist.stream.plan import Picks, Plan

Sample = tuple[int, int, int, int]


def samples(picks: Picks) -> list[Sample]:
    """(epoch, view, shard, row) of each row."""
    columns = (picks.epochs, picks.views, picks.shards, picks.rows)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def lane_streams(plan: Plan, consumed: int, per_lane: int, steps: int) -> list[list[Sample]]:
    """What each lane yields in ``steps`` global batches."""
    streams: list[list[Sample]] = [[] for _ in range(plan.lanes)]
    for step in range(steps):
        batch = samples(plan.picks(consumed + step * per_lane, per_lane, range(plan.lanes * per_lane)))
        for lane, stream in enumerate(streams):
            stream += batch[lane * per_lane : (lane + 1) * per_lane]
    return streams


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shards = draw(st.lists(st.integers(0, 23), min_size=1, max_size=8).filter(sum))
    return Plan(
        shard_samples=shards,
        views=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**63 - 1)),
        lanes=draw(st.integers(1, 9)),
        block_samples=draw(st.none() | st.integers(1, 30)),
        window_blocks=draw(st.integers(1, 4)),
    )


def spelt_out(plan: Plan, shards: list[int], epochs: int) -> list[list[Sample]]:
    """The lanes' streams as the definition has them, a list at a time."""
    blocks = [
        [(shard, row) for row in range(low, min(low + plan.block_samples, size))]
        for shard, size in enumerate(shards)
        for low in range(0, size, plan.block_samples)
    ]
    size, lanes = plan.samples, plan.lanes
    streams: list[list[Sample]] = [[] for _ in range(lanes)]
    for epoch in range(epochs):
        order = permutation(plan.seed, Purpose.BLOCK_ORDER, (epoch,), len(blocks))
        stream = [(place, *sample) for place, block in enumerate(order) for sample in blocks[block]]
        for lane in range(lanes):
            length = ((epoch + 1) * size + lane) // lanes - (epoch * size + lane) // lanes
            run, stream = stream[:length], stream[length:]
            pieces = [list(piece) for _, piece in itertools.groupby(run, lambda sample: sample[0])]
            for window in range(-(-len(pieces) // plan.window_blocks)):
                first = window * plan.window_blocks
                mixed = list(itertools.chain.from_iterable(pieces[first : first + plan.window_blocks]))
                for index in permutation(plan.seed, Purpose.WINDOW_ORDER, (epoch, lane, window), len(mixed)):
                    streams[lane].append((epoch, epoch % plan.views, *mixed[index][1:]))
        assert not stream
    return streams


@settings(max_examples=100, deadline=None)
@given(
    shards=st.lists(st.integers(0, 23), min_size=1, max_size=8).filter(sum),
    lanes=st.integers(1, 9),
    block=st.none() | st.integers(1, 30),
    window=st.integers(1, 4),
    views=st.integers(1, 3),
)
def test_the_order_is_the_one_defined(
    shards: list[int], lanes: int, block: int | None, window: int, views: int
) -> None:
    plan = Plan(shard_samples=shards, views=views, seed=4, lanes=lanes, block_samples=block, window_blocks=window)
    expected = spelt_out(plan, shards, 3)
    length = min(map(len, expected))
    assert lane_streams(plan, 0, length, 1) == [stream[:length] for stream in expected]


@settings(max_examples=150, deadline=None)
@given(plan=plans(), epochs=st.integers(1, 5), first=st.integers(0, 40))
def test_each_epoch_has_every_sample_exactly_once(plan: Plan, epochs: int, first: int) -> None:
    per_lane = -(-(first + epochs) * plan.samples // plan.lanes) + 1
    seen = Counter(samples(plan.picks(0, per_lane, range(plan.lanes * per_lane))))
    for epoch in range(first, first + epochs):
        own = {sample: count for sample, count in seen.items() if sample[0] == epoch}
        assert all(count == 1 for count in own.values())
        assert len(own) == plan.samples
        assert {view for _, view, _, _ in own} == {epoch % plan.views}


@settings(max_examples=100, deadline=None)
@given(plan=plans(), data=st.data(), position=st.integers(0, 60))
def test_the_windows_of_a_lane_hold_what_it_reads_between_their_ends(
    plan: Plan, data: st.DataObject, position: int
) -> None:
    lane = data.draw(st.integers(0, plan.lanes - 1))
    window = plan.window(lane, position)
    assert window.begin <= position < window.end
    for _ in range(5):
        length = window.end - window.begin
        picks = samples(plan.picks(window.begin, length, range(lane * length, (lane + 1) * length)))
        held = [(piece.view, piece.shard, piece.row + row) for piece in window.pieces for row in range(piece.rows)]
        assert sorted(held) == sorted(sample[1:] for sample in picks)
        assert len({epoch for epoch, *_ in picks}) == 1
        assert len(window.pieces) <= plan.window_blocks
        assert all(piece.rows <= plan.block_samples for piece in window.pieces)
        assert plan.window(lane, window.end - 1) == window
        assert plan.window(lane, window.end).begin == window.end
        window = plan.window(lane, window.end)


def test_epochs_far_into_a_run_are_whole_too() -> None:
    plan = Plan(shard_samples=[1000, 7, 0, 500], views=2, seed=3, lanes=6)
    start = 10**9 * plan.samples // plan.lanes  # the billionth epoch
    seen = Counter(s for s in samples(plan.picks(start - 1, 600, range(3600))) if s[0] == 10**9)
    assert len(seen) == plan.samples
    assert set(seen.values()) == {1}


@settings(max_examples=100, deadline=None)
@given(plan=plans(), consumed=st.integers(0, 200), per_lane=st.integers(1, 6), data=st.data())
def test_any_cut_of_the_rows_gives_the_same_rows(
    plan: Plan, consumed: int, per_lane: int, data: st.DataObject
) -> None:
    rows = plan.lanes * per_lane
    whole = samples(plan.picks(consumed, per_lane, range(rows)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    edges = [0, *cuts, rows]
    parts = [samples(plan.picks(consumed, per_lane, range(low, high))) for low, high in itertools.pairwise(edges)]
    assert list(itertools.chain.from_iterable(parts)) == whole


@settings(max_examples=100, deadline=None)
@given(plan=plans(), steps=st.integers(1, 8), cut=st.integers(0, 8), sizes=st.tuples(*[st.integers(1, 5)] * 2))
def test_another_global_batch_continues_the_same_lanes(
    plan: Plan, steps: int, cut: int, sizes: tuple[int, int]
) -> None:
    before, after = sizes
    straight = lane_streams(plan, 0, 1, cut * before + steps * after)
    first = lane_streams(plan, 0, before, cut)
    resumed = lane_streams(pickle.loads(pickle.dumps(plan)), cut * before, after, steps)
    assert [a + b for a, b in zip(first, resumed, strict=True)] == straight


def test_what_was_asked_for_before_does_not_matter() -> None:
    plan = Plan(shard_samples=[40, 31], views=2, seed=9, lanes=4, block_samples=8, window_blocks=2)
    expected = [samples(plan.picks(k, 1, range(4))) for k in range(60)]
    for k in np.random.default_rng(0).permutation(60).tolist():
        assert samples(plan.picks(k, 1, range(4))) == expected[k]


def test_epochs_differ_in_order_and_lanes_turn_over_together() -> None:
    plan = Plan(shard_samples=[64] * 4, views=1, seed=1, lanes=4, block_samples=8)
    streams = lane_streams(plan, 0, 1, 256)
    epochs = np.array([[epoch for epoch, *_ in stream] for stream in streams])
    assert (epochs.max(axis=0) - epochs.min(axis=0)).max() <= 1
    first = [[s[2:] for s in stream if s[0] == 0] for stream in streams]
    second = [[s[2:] for s in stream if s[0] == 1] for stream in streams]
    assert first != second


def test_a_lane_reads_whole_blocks() -> None:
    plan = Plan(shard_samples=[640] * 10, views=1, seed=5, lanes=8, block_samples=64)
    for stream in lane_streams(plan, 0, 1, 800):
        blocks = [(shard, row // 64) for _, _, shard, row in stream]
        switches = sum(a != b for a, b in itertools.pairwise(blocks))
        assert switches == len(set(blocks)) - 1  # once left, a block is not come back to
        assert len(set(blocks)) <= 800 // 64 + 2
        rows = [row for _, _, _, row in stream]
        assert rows != sorted(rows)


def test_a_window_mixes_its_blocks() -> None:
    plan = Plan(shard_samples=[640] * 10, views=1, seed=5, lanes=2, block_samples=64, window_blocks=4)
    window = lane_streams(plan, 0, 1, 256)[0]
    blocks = [(shard, row // 64) for _, _, shard, row in window]
    assert len(set(blocks)) == 4
    assert len(set(blocks[:32])) == 4


@pytest.mark.parametrize(("shards", "lanes", "block"), [([100_000], 8, 64), ([300], 4, 4), ([5], 64, 1)])
def test_blocks_are_64_samples_or_a_sixteenth_of_a_lane(shards: list[int], lanes: int, block: int) -> None:
    assert Plan(shard_samples=shards, views=1, seed=0, lanes=lanes).block_samples == block


def test_the_bit_stream_is_pinned() -> None:
    plan = Plan(shard_samples=[5, 0, 9, 6], views=2, seed=7, lanes=2, block_samples=4, window_blocks=2)
    assert samples(plan.picks(6, 6, range(12))) == VECTOR
    assert plan.constants() == CONSTANTS


def test_constants_survive_json_and_a_difference_is_named() -> None:
    plan = Plan(shard_samples=[50], views=2, seed=3, lanes=2, dataset_digest="d1")
    saved = json.loads(json.dumps(plan.constants()))
    plan.check(saved)
    for field in saved:
        with pytest.raises(CheckpointError, match=rf"plan\.{field}: the checkpoint has 'other'"):
            plan.check({**saved, field: "other"})
    uneven = Plan(shard_samples=[20, 30], views=2, seed=3, lanes=2, dataset_digest="d1")
    with pytest.raises(CheckpointError, match="first_picks"):
        uneven.check(saved)


def test_asking_for_constants_leaves_the_order_alone() -> None:
    plan = Plan(shard_samples=[50], views=1, seed=3, lanes=2)
    before = samples(plan.picks(20, 2, range(4)))
    plan.constants()
    assert samples(plan.picks(20, 2, range(4))) == before


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Plan(shard_samples=[0, 0], views=1, seed=0, lanes=1)
    with pytest.raises(ConfigError, match=r"loader\.lanes"):
        Plan(shard_samples=[4], views=1, seed=0, lanes=0)
    plan = Plan(shard_samples=[4], views=1, seed=0, lanes=2)
    with pytest.raises(ValueError, match="rows of a global batch"):
        plan.picks(0, 2, range(3, 5))
    assert samples(plan.picks(0, 2, range(2, 2))) == []


def test_a_hundred_million_samples_need_only_the_blocks_they_ask_for() -> None:
    plan = Plan(shard_samples=[10_000] * 10_000, views=1, seed=0, lanes=512)
    picks = plan.picks(195_300, 32, range(64 * 32))  # across the end of the first epoch
    assert set(picks.epochs.tolist()) == {0, 1}
    held = sum(order.blocks.nbytes + order.bounds.nbytes for order in plan._orders.values())
    assert held < 40e6
    assert len(pickle.dumps(plan)) < 1e6


VECTOR = [
    (0, 0, 2, 4),
    (0, 0, 2, 7),
    (0, 0, 2, 5),
    (0, 0, 2, 6),
    (1, 1, 2, 2),
    (1, 1, 0, 0),
    (0, 0, 2, 1),
    (0, 0, 0, 4),
    (0, 0, 3, 5),
    (0, 0, 3, 4),
    (1, 1, 2, 7),
    (1, 1, 2, 6),
]
CONSTANTS = {
    "version": 1,
    "dataset_digest": "",
    "seed": 7,
    "lanes": 2,
    "block_samples": 4,
    "window_blocks": 2,
    "samples": 20,
    "views": 2,
    "first_picks": "9bc65a7f2dde4101ae0841d1175c1c02df1d91bd570c2b4e4ec40957c3fe7c11",
}
