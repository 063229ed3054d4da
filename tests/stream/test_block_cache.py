"""Blocks kept on a local disk: taken only if they are the ones asked for, bounded, and never what stops a run."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.stream_data import DataSet, assert_equal

from beit_dist.storage.opening import open_place
from beit_dist.stream import counts
from beit_dist.stream.block_cache import BlockCache

BLOCK = bytes(range(256)) * 4
SIZE = len(BLOCK) + 32  # with its mark


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    counts.take()
    return BlockCache(tmp_path / "cache", 10 * SIZE, "d" * 64)


def files(cache: BlockCache) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file() and path.name != "usage"]


def lookups() -> dict[str, int]:
    return counts.take().get("beit_data_cache_lookups", {})


def test_a_block_is_found_again_as_it_was_and_by_nothing_else(cache: BlockCache) -> None:
    assert cache.get("v00/0.tar", 0, len(BLOCK)) is None
    cache.put("v00/0.tar", 0, BLOCK)
    same = pickle.loads(pickle.dumps(cache))
    other = BlockCache(cache.folder, cache.limit, "e" * 64)
    assert same.get("v00/0.tar", 0, len(BLOCK)) == BLOCK
    for shard, offset, size in (("v00/0.tar", 0, 10), ("v00/0.tar", 10, len(BLOCK)), ("v01/0.tar", 0, len(BLOCK))):
        assert cache.get(shard, offset, size) is None
    assert other.get("v00/0.tar", 0, len(BLOCK)) is None
    assert lookups() == {"miss": 5, "hit": 1}


def test_the_bytes_in_use_are_counted_by_one_process_at_a_time(
    cache: BlockCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, locked = os.pwrite, []

    def look(file: int, content: bytes, offset: int) -> int:
        with open(cache.folder / "usage") as another, pytest.raises(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.append(content)
        return write(file, content, offset)

    monkeypatch.setattr(os, "pwrite", look)
    cache.put("v00/0.tar", 0, BLOCK)
    assert locked


def test_a_file_that_was_cut_grew_or_lies_under_anothers_name_is_not_taken(cache: BlockCache) -> None:
    cache.put("v00/0.tar", 0, BLOCK)
    cache.put("v00/0.tar", 4096, BLOCK[::-1])
    first, second = (cache._path("v00/0.tar", offset, len(BLOCK)) for offset in (0, 4096))
    os.replace(first, second)
    assert cache.get("v00/0.tar", 4096, len(BLOCK)) is None
    assert not second.exists()
    for size in (SIZE - 1, SIZE + 1, 0):
        cache.put("v00/0.tar", 0, BLOCK)
        os.truncate(first, size)
        assert cache.get("v00/0.tar", 0, len(BLOCK)) is None
        assert not first.exists()
    assert lookups() == {"damaged": 4}


def test_the_oldest_go_and_the_rest_stays_below_the_limit(cache: BlockCache) -> None:
    for number in range(10):
        cache.put("shard", 1024 * number, BLOCK)
        os.utime(cache._path("shard", 1024 * number, len(BLOCK)), (number, number))
    assert len(files(cache)) == 10
    assert cache.get("shard", 0, len(BLOCK)) == BLOCK  # and so used last
    for number in range(10, 30):
        cache.put("shard", 1024 * number, BLOCK)
        assert sum(path.stat().st_size for path in files(cache)) <= cache.limit
        if number == 10:
            assert cache.get("shard", 0, len(BLOCK)) == BLOCK
            assert cache.get("shard", 1024, len(BLOCK)) is None
            assert cache.get("shard", 10 * 1024, len(BLOCK)) == BLOCK
    assert len(files(cache)) >= 8
    cache.put("shard", 0, bytes(cache.limit))  # larger than all
    assert len(files(cache)) >= 8


def test_what_others_removed_or_lost_count_of_is_counted_anew(cache: BlockCache) -> None:
    for number in range(10):
        cache.put("shard", 1024 * number, BLOCK)
    for path in files(cache):
        path.unlink()
    (cache.folder / "usage").write_bytes(b"not a number")
    for number in range(10):
        cache.put("shard", 1024 * number, BLOCK)
    assert len(files(cache)) == 10


def test_many_that_keep_and_remove_at_once_do_one_another_no_harm(cache: BlockCache) -> None:
    faults: list[object] = []

    def work(first: int) -> None:
        own = BlockCache(cache.folder, cache.limit, cache.digest)
        for number in range(60):
            offset = 1024 * ((first + 7 * number) % 25)
            content = own.get("shard", offset, len(BLOCK))
            if content is None:
                own.put("shard", offset, BLOCK)
            elif content != BLOCK:
                faults.append(offset)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert set(lookups()) <= {"hit", "miss"}
    # Each that writes may be over the limit by the block that it writes.
    assert sum(path.stat().st_size for path in files(cache)) <= cache.limit + len(threads) * SIZE
    assert not [path for path in files(cache) if path.suffix == ".tmp"]


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(cache: BlockCache) -> None:
    cache.put("shard", 0, BLOCK)
    folder = files(cache)[0].parent
    old, new = folder / ".a.host-1-1.tmp", folder / ".b.host-1-1.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    cache.remove_leftovers()
    assert sorted(path.name for path in files(cache)) == [new.name, "shard.0+1024"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_faulty_disk_costs_the_cache_and_is_told_once(
    cache: BlockCache, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    for number in range(3):
        cache.put("shard", 1024 * number, BLOCK)
        cache._pause_until = -1.0  # as a minute later
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", fail)
        assert cache.get("shard", 0, len(BLOCK)) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert ("free some space" in caplog.text) == (code == errno.ENOSPC)
    assert not files(cache)
    assert lookups() == {"failed": 4}


# ------------------------------------------------------------------------------------------- with the loader


@pytest.fixture
def stored(data: DataSet) -> Iterator[DataSet]:
    """The data set at a URL."""
    url = f"memory://{uuid.uuid4()}/shards"
    for name in ["manifest.json", *(shard.name for shard in data.manifest.shards)]:
        open_place(url).write(name, (data.root / name).read_bytes())
    return data.at(url)


def test_the_next_start_fetches_nothing_and_a_damaged_block_is_fetched_anew(
    stored: DataSet, tmp_path: Path
) -> None:
    def take(steps: int = 3) -> dict[str, dict[str, int]]:
        counts.take()
        others = set(threading.enumerate())
        for step, rows in enumerate(stored.take(steps, cache_dir=str(tmp_path))):
            assert_equal(rows, stored.stored(2 * step, 8))
        for thread in set(threading.enumerate()) - others:
            if thread.name.startswith("fetch-"):  # what it still looks up would count for the next start
                thread.join(60)
        return counts.take()

    first, second = take(8), take()  # the second looks less far ahead than the first has read
    assert first["beit_data_read_bytes"]["store"] > 0
    assert set(second["beit_data_read_bytes"]) == {"cache"}
    assert set(second["beit_data_cache_lookups"]) == {"hit"}
    for path in tmp_path.rglob("*shard-*"):
        with open(path, "r+b") as file:
            file.seek(2000)  # among the patches of the first sample
            file.write(b"\xff\x00\xff\x00")
    # Each reads less than the one before has certainly read, a step ahead included.
    third, fourth, fifth = take(12), take(8), take()
    assert third["beit_data_samples_read_again"]["whole"] > 0
    assert third["beit_data_cache_lookups"]["damaged"] > 0
    assert "beit_data_samples_read_again" not in fourth
    assert fourth["beit_data_cache_lookups"]["miss"] > 0  # besides hits, if the threads get so far ahead
    assert set(fifth["beit_data_cache_lookups"]) == {"hit"}


def test_single_samples_are_not_kept(stored: DataSet, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_dir": str(tmp_path), "memory_gib": 1e-9}
    stored.take(2, **settings)
    assert not list(tmp_path.iterdir())
