"""Rank batches: the plan's samples, whole, whatever the ranks and workers; and what happens when things break."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from beit_dist.config import LoaderConfig, MaskingConfig
from beit_dist.data import shared_memory, stream
from beit_dist.data.draws import Purpose, uniforms, words
from beit_dist.data.masking import MaskGenerator
from beit_dist.data.pipeline import split_rows
from beit_dist.data.plan import Plan
from beit_dist.data.shards import Manifest
from beit_dist.data.storage import LocalReader
from beit_dist.data.stream import RankBatches, shared_memory_bytes
from beit_dist.errors import ConfigError, DataError, SampleError, SpaceError

RATES = (0.0, 0.3, 0.6)
FIELDS = ("patches", "tokens", "positions", "keeps", "sample_ids", "epochs")
Rows = dict[str, NDArray[Any]]


class DataSet:
    """A tiny data set and what the trainer would make of it."""

    def __init__(self, root: Path, manifest: Manifest, **plan: Any) -> None:
        self.root, self.manifest = root, manifest
        self.shards = [shard.samples for shard in manifest.view_shards(0)]
        self.plan = Plan(**{"shard_samples": self.shards, "views": manifest.views, "seed": 5, "lanes": 4, **plan})
        self.masks = MaskGenerator(4, MaskingConfig(mode="original", masked_patches=6, min_block=3), 5)

    def batches(
        self, *, rank: int = 0, world: int = 1, consumed: int = 0, batch: int = 8, **loader: Any
    ) -> RankBatches:
        return RankBatches(
            root=str(self.root),
            manifest=self.manifest,
            plan=self.plan,
            masks=self.masks,
            drop_path_rates=RATES,
            global_batch=batch,
            rank=rank,
            world=world,
            consumed=consumed,
            loader=LoaderConfig(**{"workers": 0, "timeout_seconds": 60, **loader}),
        )

    def take(self, steps: int, **settings: Any) -> list[Rows]:
        """Copies of the first ``steps`` batches of one rank."""
        batches = self.batches(**settings)
        try:
            return [copied(next(batches)) for _ in range(steps)]
        finally:
            batches.close()

    def stored(self, consumed: int, batch: int) -> Rows:
        """A global batch as it is defined, read by hand."""
        layout, plan = self.manifest.layout, self.plan
        picks = plan.picks(consumed, batch // plan.lanes, range(batch))
        rows: dict[str, list[Any]] = {field: [] for field in FIELDS}
        for view, shard, row, epoch in zip(picks.views, picks.shards, picks.rows, picks.epochs, strict=True):
            raw = (self.root / self.manifest.view_shards(int(view))[shard].name).read_bytes()
            sample = raw[row * layout.stride : (row + 1) * layout.stride]
            sample_id = int(sample[: sample.index(b".json")].split(b"-")[1])
            patches = sample[layout.patches_start :][: layout.patches_nbytes]
            rows["patches"].append(np.frombuffer(patches, np.uint8).reshape(layout.patches, -1))
            tokens = sample[layout.tokens_start :][: layout.tokens_nbytes]
            rows["tokens"].append(np.frombuffer(tokens, "<i2"))
            rows["positions"].append(self.masks.positions(int(epoch), sample_id))
            drawn = uniforms(words(5, Purpose.DROP_PATH, (int(epoch), sample_id), 6)).reshape(3, 2)
            rows["keeps"].append(drawn >= np.array(RATES)[:, None])
            rows["sample_ids"].append(sample_id)
            rows["epochs"].append(epoch)
        return {field: np.array(values) for field, values in rows.items()}


def copied(batch: stream.RankBatch) -> Rows:
    return {field: getattr(batch, field).numpy().copy() for field in FIELDS}


def advance(batches: RankBatches, steps: int) -> None:
    for _ in range(steps):
        next(batches)


def joined(ranks: list[Rows]) -> Rows:
    return {field: np.concatenate([rows[field] for rows in ranks]) for field in FIELDS}


def assert_equal(got: Rows, expected: Rows) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(got[field], expected[field], err_msg=field)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_shards: Callable[..., Manifest]) -> DataSet:
    root = tmp_path_factory.mktemp("shards")
    return DataSet(root, make_shards(root, [9, 4, 12, 6], views=2, gaps=3), block_samples=3)


@pytest.fixture
def own_data(tmp_path: Path, make_shards: Callable[..., Manifest]) -> DataSet:
    """A data set that the test may damage."""
    return DataSet(tmp_path, make_shards(tmp_path, [8, 8], views=1), block_samples=2)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


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
    monkeypatch.setattr(sys.modules[__name__], "RATES", (0.0, 0.0))
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
    with pytest.raises(
        ConfigError, match=r"global_batch: got 8, expected a multiple of the 3 ranks\. Near by: ranks 1"
    ):
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
        "loader.workers: 3 reduced to 2, as a rank has no more lanes"
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


# ----------------------------------------------------------------------------------------------- bad samples


def damage(data: DataSet, shard: int, row: int, where: int = 2000) -> None:
    """Change one byte of a sample."""
    path = data.root / data.manifest.shards[shard].name
    raw = bytearray(path.read_bytes())
    offset = row * data.manifest.layout.stride + where
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_stops_the_run_and_is_named(own_data: DataSet, workers: int) -> None:
    damage(own_data, 1, 3)
    byte = 3 * own_data.manifest.layout.stride
    batches = own_data.batches(workers=workers)
    with pytest.raises(SampleError) as caught:
        advance(batches, 3)
    text = str(caught.value)
    assert text.startswith(f"v00/shard-000001.tar, sample 3, byte {byte}: damaged, also when read again: v00-0000")
    assert "got crc32" in text
    assert "loader.bad_samples" in text
    assert "Traceback" not in text
    with pytest.raises(SampleError, match="got crc32"):  # and again, if asked again
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("json", "json: got"),
        ("patches header", "patches npy header"),
        ("tokens header", "another tokens npy header"),
        ("tokens", "got crc32"),
        ("key", "got crc32"),
    ],
)
def test_every_part_of_a_sample_is_checked(own_data: DataSet, where: str, cause: str) -> None:
    layout = own_data.manifest.layout
    offset = {
        "json": layout.json_start,
        "key": layout.json_start + 10 + 8 + 9 + 14,
        "patches header": layout.patches_start - 100,
        "tokens header": layout.tokens_start - 100,
        "tokens": layout.tokens_start + 2 * layout.patches - 1,
    }[where]
    damage(own_data, 0, 0, offset)
    batches = own_data.batches()
    with pytest.raises(SampleError, match=cause):
        advance(batches, 3)
    batches.close()


def test_tokens_outside_the_vocabulary_and_samples_of_another_view_are_refused(
    tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    manifest = make_shards(tmp_path, [8], views=2, vocabulary=64)
    smaller = Manifest.from_bytes(manifest.to_bytes().replace(b'"vocabulary": 64', b'"vocabulary": 3'), "x")
    with pytest.raises(SampleError, match=r"got token \d+, expected tokens below 3"):
        DataSet(tmp_path, smaller).take(1)
    (tmp_path / "v00/shard-000000.tar").write_bytes((tmp_path / "v01/shard-000000.tar").read_bytes())
    with pytest.raises(SampleError, match="got a sample of view 1, expected view 0"):
        DataSet(tmp_path, manifest).take(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_within_the_budget_have_no_weight_and_are_counted(
    own_data: DataSet, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [own_data.stored(2 * step, 8) for step in range(2)]
    damage(own_data, 0, 1)
    damage(own_data, 1, 6)
    batches = own_data.batches(workers=workers, bad_samples=2)
    bad = 0
    for expected in whole:
        batch = next(batches)
        rows = copied(batch)
        lost = rows["sample_ids"] == -1
        assert batch.bad == lost.sum()
        bad += batch.bad
        assert (rows["positions"][lost] == -1).all()
        assert not rows["patches"][lost].any()
        assert batch.masked == (expected["positions"][~lost] >= 0).sum()
        for field in FIELDS:  # all other rows stay where they were
            np.testing.assert_array_equal(rows[field][~lost], expected[field][~lost])
    assert bad == 2
    assert "damaged sample 2 of 2 allowed: v00/shard-00000" in caplog.text
    with pytest.raises(SampleError, match=r"This is number 3; loader\.bad_samples=2"):
        advance(batches, 2)  # the next epoch meets them again
    batches.close()


def test_a_sample_that_is_whole_when_read_again_is_used(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = LocalReader.read_into, Counter[tuple[str, int]]()

    def flaky(self: LocalReader, shard: str, offset: int, buffers: Any) -> None:
        read(self, shard, offset, buffers)
        calls[shard, offset] += 1
        if calls[shard, offset] == 1:
            buffers[1][0] ^= 1

    monkeypatch.setattr(LocalReader, "read_into", flaky)
    assert_equal(data.take(1)[0], data.stored(0, 8))
    assert set(calls.values()) <= {1, 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_or_gone_while_running_is_named(own_data: DataSet, workers: int) -> None:
    path = own_data.root / "v00/shard-000001.tar"
    os.truncate(path, 2 * own_data.manifest.layout.stride + 600)
    with pytest.raises(
        SampleError, match=r"shard-000001\.tar, sample \d+, .* got \d+ bytes, expected .* cut short"
    ):
        own_data.take(3, workers=workers)
    path.unlink()
    with pytest.raises(SampleError, match=r"shard-000001\.tar, .*No such file"):
        own_data.take(3, workers=workers)


def test_a_url_is_refused_before_anything_starts(data: DataSet) -> None:
    other = DataSet(Path("s3:/bucket"), data.manifest)
    with pytest.raises(DataError, match="expected a local folder"):
        other.batches()


def test_a_loader_that_lost_its_position_is_noticed(data: DataSet) -> None:
    batches = data.batches()
    batches._check_state({"dataset_state": {"consumed": 4}}, 4)
    with pytest.raises(RuntimeError, match="expected 6"):
        batches._check_state({"dataset_state": {"consumed": 4}}, 6)
    batches.close()


# ------------------------------------------------------------------------------------------------- processes


def test_a_killed_worker_is_an_error_and_not_a_hang(data: DataSet) -> None:
    batches = data.batches(workers=2)
    next(batches)
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid or 0, signal.SIGKILL)
    with pytest.raises(SampleError, match=r"a loader worker was killed .*lower loader\.workers"):
        advance(batches, 20)
    batches.close()


def test_workers_and_their_fork_server_ignore_the_signals_of_a_scheduler(data: DataSet) -> None:
    batches = data.batches(workers=2)
    next(batches)
    workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    for process in [*workers, workers[0].parent()]:
        assert process is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
    time.sleep(0.2)
    assert_equal([copied(next(batches)) for _ in range(6)][-1], data.stored(12, 8))
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_does_not_answer_is_an_error_and_close_returns(
    own_data: DataSet, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_PATIENCE", 0.3)
    path = own_data.root / "v00/shard-000001.tar"
    path.unlink()
    os.mkfifo(path)  # opening it waits for a writer
    batches = own_data.batches(workers=workers, timeout_seconds=4 * workers + 0.5)
    with pytest.raises(SampleError, match=r"no batch within loader\.timeout_seconds"):
        advance(batches, 3)
    children = multiprocessing.active_children()
    batches.close()
    for child in children:
        child.join(10)
        assert not child.is_alive()
    writer = os.open(path, os.O_RDWR)  # lets a thread of this process go on
    batches._thread.join(30)
    os.close(writer)
    assert not batches._thread.is_alive()


def test_close_may_come_at_any_time_and_twice(data: DataSet) -> None:
    for workers in (0, 2):
        batches = data.batches(workers=workers)
        batches.close()
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)


SCRIPT = """
    import sys, time
    from pathlib import Path
    from beit_dist.config import LoaderConfig, MaskingConfig
    from beit_dist.data.masking import MaskGenerator
    from beit_dist.data.plan import Plan
    from beit_dist.data.shards import load_manifest
    from beit_dist.data.stream import RankBatches
    import multiprocessing

    def main(root, ending):
        manifest = load_manifest(root)
        plan = Plan(shard_samples=[s.samples for s in manifest.view_shards(0)], views=1, seed=0, lanes=2)
        batches = RankBatches(
            root=root, manifest=manifest, plan=plan, masks=MaskGenerator(4, MaskingConfig(min_block=3), 0),
            drop_path_rates=[0.0], global_batch=4, rank=0, world=1, consumed=0, loader=LoaderConfig(workers=2),
        )
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        if ending == "raise":
            raise SystemExit(3)
        if ending == "wait":
            time.sleep(600)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.mark.parametrize(("ending", "code"), [("return", 0), ("raise", 3), ("wait", -signal.SIGKILL)])
def test_no_worker_outlives_its_rank(data: DataSet, tmp_path: Path, ending: str, code: int) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    rank = subprocess.Popen([sys.executable, script, data.root, ending], stdout=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    try:
        assert rank.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2
        if ending == "wait":
            fork_server = workers[0].parent()
            rank.kill()
            psutil.wait_procs([*workers, *([fork_server] if fork_server else [])], timeout=30)
            assert not fork_server or not fork_server.is_running()
        assert rank.wait(60) == code
        assert not any(worker.is_running() for worker in workers)
    finally:
        rank.kill()
        for worker in workers:  # only if the promise is broken
            if worker.is_running():
                worker.kill()
