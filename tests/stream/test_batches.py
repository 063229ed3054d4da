"""Rank batches: the plan's samples, whole, whatever the ranks and workers."""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.stream_data import RATES, DataSet, assert_equal, copied, joined

from beit_dist.config.pretraining import LoaderConfig
from beit_dist.errors import ConfigError, SpaceError
from beit_dist.stream import shared_memory
from beit_dist.stream.digest import rows_digest
from beit_dist.stream.held import shared_memory_bytes
from beit_dist.stream.pipeline import split_rows

# --------------------------------------------------------------------------------------------- the samples


def test_a_batch_holds_what_plan_shards_masks_and_keys_say(data: DataSet) -> None:
    batches = data.batches(batch=12, consumed=5)
    for step in range(12):  # into the third epoch, which is the first view again
        batch = next(batches)
        expected = data.stored(5 + 3 * step, 12)
        assert_equal(copied(batch), expected)
        assert batch.consumed == 5 + 3 * step
        assert batch.masked == (expected["positions"] >= 0).sum()
        assert batch.bad == 0
    assert batch.epochs.max() > 1
    assert batch.patches.dtype == torch.uint8
    assert batch.tokens.dtype == batch.positions.dtype == torch.int16
    assert batch.keeps is not None
    assert batch.keeps.dtype == torch.uint8
    batches.close()


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3), (4, 0), (4, 2), (8, 0), (3, 0), (3, 2)]
)
def test_ranks_and_workers_change_nothing(data: DataSet, world: int, workers: int) -> None:
    ranks = [data.take(5, rank=rank, world=world, workers=workers, batch=24, consumed=2) for rank in range(world)]
    for step in range(5):
        assert_equal(joined([rank[step] for rank in ranks]), data.stored(2 + 6 * step, 24))


@settings(max_examples=25, deadline=None)
@given(
    lanes=st.integers(1, 6),
    per_lane=st.integers(1, 4),
    block=st.none() | st.integers(1, 9),
    window=st.integers(1, 3),
    consumed=st.integers(0, 50),
    data_=st.data(),
)
def test_any_division_gives_the_same_rows(
    data: DataSet,
    lanes: int,
    per_lane: int,
    block: int | None,
    window: int,
    consumed: int,
    data_: st.DataObject,
) -> None:
    own = DataSet(data.root, data.manifest, lanes=lanes, block_samples=block, window_blocks=window)
    batch = lanes * per_lane
    world = data_.draw(st.sampled_from([w for w in range(1, batch + 1) if batch % w == 0]))
    ranks = [own.take(1, rank=rank, world=world, batch=batch, consumed=consumed)[0] for rank in range(world)]
    assert_equal(joined(ranks), own.stored(consumed, batch))


def test_the_digests_of_ranks_add_up_and_show_what_a_step_is_made_of(data: DataSet) -> None:
    batches = [data.batches(batch=24, rank=rank, world=world) for world in (1, 3) for rank in range(world)]
    try:
        whole, *parts = [[next(one).digest for _ in range(4)] for one in batches]
    finally:
        for one in batches:
            one.close()
    assert whole == [sum(step) % 2**64 for step in zip(*parts, strict=True)]
    assert len(set(whole)) == 4

    rows = data.stored(0, 24)
    names = ("sample_ids", "epochs", "positions", "keeps")

    def digest(**changed: NDArray[Any]) -> int:
        return rows_digest(0, *({**rows, **changed}[name] for name in names))

    assert digest() == whole[0]
    seen = {digest(), rows_digest(1, *(rows[name] for name in names))}
    for name in names:
        other = rows[name].copy()
        other[5] = 1 - other[5]
        seen |= {digest(**{name: other}), digest(**{name: rows[name][::-1]})}
    # As many as there are changes; the epochs of these rows are all the same, so their order is none.
    assert len(seen) == 2 + 2 * len(names) - 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumed_at_its_integer_continues_as_if_never_stopped(data: DataSet, workers: int) -> None:
    straight = data.take(6, workers=workers)
    for cut in (1, 4):
        resumed = data.take(2, workers=2 - workers, consumed=2 * cut)
        assert_equal(resumed[0], straight[cut])
        assert_equal(resumed[1], straight[cut + 1])


def test_another_global_batch_goes_on_with_the_same_lanes(data: DataSet) -> None:
    straight = [data.stored(k, 4)["sample_ids"] for k in range(12)]  # one sample of each lane
    for rows, low in zip(data.take(3, batch=16, workers=1), range(0, 12, 4), strict=True):
        np.testing.assert_array_equal(rows["sample_ids"].reshape(4, 4).T, straight[low : low + 4])


def test_an_epoch_read_by_workers_has_every_sample_once(data: DataSet) -> None:
    steps = 3 * data.plan.samples // 8 + 2
    rows = joined(data.take(steps, workers=2))
    for epoch in (0, 1, 2):
        ids = Counter(rows["sample_ids"][rows["epochs"] == epoch].tolist())
        assert len(ids) == data.plan.samples
        assert set(ids.values()) == {1}


def test_a_batch_stays_valid_until_the_second_call_after_it(data: DataSet) -> None:
    for workers in (0, 2):
        batches, previous = data.batches(workers=workers), None
        for step in range(8):
            batch = next(batches)
            time.sleep(0.02)  # time for the loader to write where it must not
            if previous is not None:
                assert_equal(copied(previous), data.stored(2 * step - 2, 8))
            previous = batch
        batches.close()


def test_without_drop_path_there_are_no_keeps(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.stream_data.RATES", (0.0, 0.0))
    batches = data.batches()
    assert next(batches).keeps is None
    batches.close()


def test_drop_path_drops_at_each_blocks_rate(data: DataSet) -> None:
    keeps = joined(data.take(60, batch=24))["keeps"]
    assert keeps.mean(0) == pytest.approx(1 - np.array([RATES, RATES]).T, abs=0.06)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generators(data: DataSet, workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    data.take(2, workers=workers)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


# --------------------------------------------------------------------------------------------- the division


@settings(max_examples=200, deadline=None)
@given(start=st.integers(0, 50), length=st.integers(1, 50), per_lane=st.integers(1, 9), parts=st.integers(1, 8))
def test_rows_are_split_into_whole_lanes(start: int, length: int, per_lane: int, parts: int) -> None:
    rows = range(start, start + length)
    split = split_rows(rows, per_lane, parts)
    assert [row for part in split for row in part] == list(rows)
    assert all(len(part) for part in split)
    assert all(part.start % per_lane == 0 for part in split[1:])
    lanes = math.ceil(rows.stop / per_lane) - rows.start // per_lane
    assert len(split) == min(parts, lanes)


def test_a_batch_that_ranks_or_lanes_do_not_divide_is_refused(data: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"global_batch: got 8, expected a multiple of the 3 ranks\. Try 1"):
        data.batches(batch=8, world=3)
    with pytest.raises(ConfigError, match="a multiple of the run's 4 lanes"):
        data.batches(batch=6)


def test_more_workers_than_lanes_are_reduced_with_a_notice(
    data: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        batches = data.batches(world=2, workers=3)
        next(batches)
        assert len(multiprocessing.active_children()) == batches.workers == 2
        batches.close()
        data.batches(world=2, workers=3, rank=1).close()
    assert [record.message for record in caplog.records] == [
        "loader.workers: 3 reduced to 2, the number of lanes of a rank"
    ]


def test_ranks_that_do_not_divide_the_lanes_are_told_what_it_costs(
    data: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    data.batches(batch=24, world=3).close()
    assert "3 ranks do not divide 4 lanes" in caplog.text


# ------------------------------------------------------------------------------------------------ /dev/shm


def test_workers_hold_no_more_shared_memory_than_is_said(data: DataSet) -> None:
    batches = data.batches(workers=2, batch=24, prefetch=3)
    for _ in range(8):
        next(batches)
    batches.close()
    held = sum(array.nbytes for slot in batches._slots.values() for array in slot.values())
    said = shared_memory_bytes(
        layout=data.manifest.layout,
        positions=data.masks.positions_per_image,
        rank_rows=24,
        depth=3,
        loader=batches.loader,
    )
    assert 0.95 * said < held <= said
    assert len(batches._slots) == 2 * (3 + 1)


def test_no_workers_need_no_shared_memory(data: DataSet) -> None:
    none = LoaderConfig(workers=0)
    assert shared_memory_bytes(layout=data.manifest.layout, positions=1, rank_rows=9, loader=none) == 0


def test_prefetch_shrinks_to_the_room_there_is_and_then_is_refused(
    data: DataSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert shared_memory.fit_prefetch(4, 100, 10_000) == 4
    assert shared_memory.fit_prefetch(4, 100, 399) == 2
    assert shared_memory.fit_prefetch(4, 100, 200) == 1
    with pytest.raises(SpaceError, match=r"got 199 bytes for this rank, expected at least 200 .*workers=0"):
        shared_memory.fit_prefetch(4, 100, 199)
    monkeypatch.setattr(shared_memory, "room", lambda ranks: 100_000 // ranks)
    batches = data.batches(workers=1, prefetch=9)
    assert batches.prefetch < 9
    next(batches)
    batches.close()
    assert f"loader.prefetch: 9 reduced to {batches.prefetch}" in caplog.text
    monkeypatch.setattr(shared_memory, "room", lambda ranks: 1000)
    with pytest.raises(SpaceError):
        data.batches(workers=1)
