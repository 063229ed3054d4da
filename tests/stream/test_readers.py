"""Reads are whole or an error that names shard and byte."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from beit_dist.errors import SampleError
from beit_dist.stream import readers as storage
from beit_dist.stream.readers import LocalReader, open_reader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "v00").mkdir()
    for number in range(4):
        (tmp_path / f"v00/{number}.tar").write_bytes(bytes(range(number, number + 200)))
    return tmp_path


def read(reader: storage.ShardReader, shard: str, offset: int, *sizes: int) -> list[bytes]:
    buffers = [bytearray(size) for size in sizes]
    reader.read_into(shard, offset, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


def test_a_range_is_scattered_over_the_buffers(folder: Path) -> None:
    reader = open_reader(str(folder))
    assert read(reader, "v00/0.tar", 10, 3, 0, 2) == [b"\x0a\x0b\x0c", b"", b"\x0d\x0e"]


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def stingy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole(descriptor, [next(buffer for buffer in buffers if buffer.nbytes)[:2]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    assert read(LocalReader(str(folder)), "v00/1.tar", 0, 3, 4) == [b"\x01\x02\x03", b"\x04\x05\x06\x07"]


def test_a_range_past_the_end_is_an_error(folder: Path) -> None:
    with pytest.raises(
        SampleError, match=r"v00/0\.tar: byte 190: got 10 bytes, expected 20; the file is cut short"
    ):
        read(LocalReader(str(folder)), "v00/0.tar", 190, 15, 5)


def test_a_missing_shard_is_an_error_and_is_found_once_it_is_there(folder: Path) -> None:
    reader = LocalReader(str(folder))
    with pytest.raises(SampleError, match=r"v00/9\.tar: not found"):
        read(reader, "v00/9.tar", 0, 1)
    (folder / "v00/9.tar").write_bytes(b"x")
    assert read(reader, "v00/9.tar", 0, 1) == [b"x"]


def test_a_shard_that_was_put_right_is_opened_anew(folder: Path) -> None:
    reader = LocalReader(str(folder))
    (folder / "short").write_bytes(b"ab")
    os.replace(folder / "short", folder / "v00/0.tar")
    with pytest.raises(SampleError):
        read(reader, "v00/0.tar", 0, 4)
    (folder / "long").write_bytes(b"abcd")
    os.replace(folder / "long", folder / "v00/0.tar")
    assert read(reader, "v00/0.tar", 0, 4) == [b"abcd"]


def test_open_files_are_bounded_and_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = LocalReader(str(folder))
    for shard in (0, 1, 2, 1, 3, 0):
        assert read(reader, f"v00/{shard}.tar", 5, 1) == [bytes([shard + 5])]
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_sent_to_another_process_opens_its_own_files(folder: Path) -> None:
    reader = LocalReader(str(folder))
    read(reader, "v00/0.tar", 0, 1)
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._open
    reader.close()
    assert read(copy, "v00/0.tar", 7, 1) == [b"\x07"]
