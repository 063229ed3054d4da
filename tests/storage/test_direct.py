"""Direct writes: the same bytes whatever the pieces and the file system, and an error is an error."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from beit_dist.storage.direct import ALIGNMENT, DirectFile, aligned_memory
from beit_dist.storage.local import LocalPlace

WHOLE = 1_234_567
REAL_OPEN, REAL_WRITE = os.open, os.write


def content() -> memoryview:
    """Random bytes in aligned memory."""
    memory = aligned_memory(WHOLE)
    memory[:WHOLE] = random.Random(0).randbytes(WHOLE)
    return memoryview(memory)[:WHOLE]


def without_direct_open(path: Path, flags: int, mode: int = 0o777) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return REAL_OPEN(path, flags, mode)


def without_direct_write(descriptor: int, part: memoryview) -> int:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return REAL_WRITE(descriptor, part)


def short_write(descriptor: int, part: memoryview) -> int:
    return REAL_WRITE(descriptor, part[: max(1, len(part) * 2 // 3)])


SYSTEMS: dict[str, tuple[str, Callable[..., int]]] = {
    "as it is": ("getpid", os.getpid),
    "refuses to open": ("open", without_direct_open),
    "refuses to write": ("write", without_direct_write),
    "writes less than asked": ("write", short_write),
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cut", ["aligned pieces", "odd pieces", "one piece"])
def test_a_file_has_the_bytes_it_was_given(
    tmp_path: Path, system: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, draws = content(), random.Random(1)
    name, replacement = SYSTEMS[system]
    monkeypatch.setattr(os, name, replacement)
    with LocalPlace(tmp_path).writing("file") as file:
        low = 0
        while low < WHOLE:
            size = {"aligned pieces": 65_536, "odd pieces": draws.randrange(1, 90_000), "one piece": WHOLE}[cut]
            part = whole[low : low + size]
            assert file.write(part) == len(part)
            low += size
    assert (tmp_path / "file").read_bytes() == whole
    assert os.listdir(tmp_path) == ["file"]


def test_aligned_memory_is_written_as_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy, and past the page cache where the file system can; only a last part of a block goes through it."""
    whole, requests = content(), []

    def watched(descriptor: int, part: memoryview) -> int:
        requests.append((len(part), file.is_direct))
        return REAL_WRITE(descriptor, part)

    with DirectFile(tmp_path / "file") as file:
        direct = file.is_direct
        monkeypatch.setattr(os, "write", watched)
        file.write(whole)
    last = WHOLE % ALIGNMENT
    assert requests == ([(WHOLE - last, True), (last, False)] if direct else [(WHOLE, False)])


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(part: bytes | memoryview) -> None:
        with LocalPlace(tmp_path).writing("file") as file:
            file.write(part)

    monkeypatch.setattr(os, "write", full)
    for part in (content(), b"less than a block"):  # while writing, and when what was held back is written
        with pytest.raises(OSError, match="No space left"):
            write(part)
        assert os.listdir(tmp_path) == []


def test_forked_processes_do_not_share_the_memory() -> None:
    """The kernel's flags of the mapping say so: ``dc``, do not copy area on fork (``man 5 proc``)."""
    memory = aligned_memory(3 * mmap.PAGESIZE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        low, high = (int(number, 16) for number in mapping.split(maxsplit=1)[0].split("-"))
        if low <= address < high:
            assert " dc" in mapping.rpartition("VmFlags:")[2]
            return
    pytest.fail("no such mapping")
