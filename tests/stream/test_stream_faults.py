"""The stream when samples, shards, workers, storage or ranks break."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.processes import left_of, living
from support.stream_data import FIELDS, DataSet, advance, assert_equal, copied

from beit_dist.errors import ConfigError, SampleError
from beit_dist.shards.manifest import Manifest
from beit_dist.stream import loading
from beit_dist.stream.readers import LocalReader
from beit_dist.stream.workers import IGNORED_SIGNALS

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
    with pytest.raises(SampleError, match=r"That makes 3; loader\.bad_samples allows 2"):
        advance(batches, 2)  # the next epoch meets them again
    batches.close()


def test_a_sample_that_is_whole_when_read_again_is_used(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = LocalReader.read_into, Counter[tuple[str, int]]()

    def flaky(self: LocalReader, shard: str, offset: int, buffers: Any, fresh: bool) -> None:
        read(self, shard, offset, buffers, fresh=fresh)
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
    with pytest.raises(SampleError, match=r"shard-000001\.tar: not found, also when tried again"):
        own_data.take(3, workers=workers)


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
    with pytest.raises(SampleError, match=r"a loader worker was killed .*[Ll]ower loader\.workers"):
        advance(batches, 20)
    batches.close()


def test_a_folder_of_temporary_files_too_deep_for_sockets_is_named() -> None:
    error = loading._explained(OSError("AF_UNIX path too long"))  # what multiprocessing says, without the path
    assert isinstance(error, ConfigError)
    assert str(error).startswith("TMPDIR: ")


def test_workers_and_their_fork_server_ignore_the_signals_of_a_scheduler(data: DataSet) -> None:
    batches = data.batches(workers=2)
    next(batches)
    workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    for process in [*workers, workers[0].parent()]:
        assert process is not None
        for number in IGNORED_SIGNALS:
            process.send_signal(number)
    time.sleep(0.2)
    assert_equal([copied(next(batches)) for _ in range(6)][-1], data.stored(12, 8))
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_does_not_answer_is_an_error_and_close_returns(
    own_data: DataSet, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_PATIENCE", 0.3)
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
    from beit_dist.config.masking import MaskingConfig
    from beit_dist.config.pretraining import LoaderConfig
    from beit_dist.stream.masking.modes import masks_of
    from beit_dist.stream.plan import Plan
    from beit_dist.shards.manifest import load_manifest
    from beit_dist.stream.batches import RankBatches
    import multiprocessing

    def main(root, ending):
        manifest = load_manifest(root)
        plan = Plan(shard_samples=[s.samples for s in manifest.view_shards(0)], views=1, seed=0, lanes=2)
        batches = RankBatches(
            root=root, manifest=manifest, plan=plan, masks=masks_of(MaskingConfig(min_block=3), 4, 0),
            drop_path_rates=[0.0], global_batch=4, rank=0, world=1, consumed=0, loader=LoaderConfig(workers=2),
        )
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        sys.stdin.read()  # until the test has looked at them
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
    command = [sys.executable, script, data.root, ending]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    try:
        assert rank.stdin is not None
        assert rank.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2
        rank.stdin.close()
        if ending == "wait":
            helpers = psutil.Process(rank.pid).children(recursive=True)
            assert any("resource_tracker" in " ".join(helper.cmdline()) for helper in helpers)
            for helper in helpers:  # as a scheduler does to all processes of a job
                for number in IGNORED_SIGNALS:
                    helper.send_signal(number)
            time.sleep(0.2)
            assert all(helper.status() != psutil.STATUS_ZOMBIE for helper in helpers)
            fork_server = workers[0].parent()
            rank.kill()
            assert not left_of([*workers, *([fork_server] if fork_server else [])], seconds=60)
        assert rank.wait(60) == code
        assert not living(workers)
    finally:
        rank.kill()
        for worker in workers:  # only if the promise is broken
            if worker.is_running():
                worker.kill()
