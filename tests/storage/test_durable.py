"""Files are whole or not there, and created once, on whatever file system they lie."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from beit_dist.storage import durable

NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """``answer("link", errno.EPERM)``: what the file system says to that call from now on."""

    def make(call: str, number: int) -> None:
        def refused(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(durable.os, call, refused)

    return make


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_without_hard_links_a_file_is_created_whole_and_once(
    tmp_path: Path, answer: Callable[[str, int], None], number: int
) -> None:
    answer("link", number)
    path = tmp_path / "manifest.json"
    assert durable.write_once(path, b"mine" * 10_000)
    assert not durable.write_once(path, b"another's")
    assert path.read_bytes() == b"mine" * 10_000
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        durable.write_once(tmp_path / "gone" / "manifest.json", b"")


def test_without_hard_links_one_of_many_creates_a_file(tmp_path: Path, answer: Callable[[str, int], None]) -> None:
    answer("link", errno.EPERM)
    answers: dict[int, bool] = {}

    def create(index: int) -> None:
        answers[index] = durable.write_once(tmp_path / "once", b"by %d" % index)

    threads = [threading.Thread(target=create, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (index for index, created in answers.items() if created)
    assert (tmp_path / "once").read_bytes() == b"by %d" % winner


def test_a_writer_that_hung_has_not_created_what_was_replaced_meanwhile(
    tmp_path: Path, answer: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("link", errno.EPERM)
    path, sync = tmp_path / "once", durable.sync

    def replaced(descriptor: int) -> None:
        sync(descriptor)
        if path.exists():
            monkeypatch.setattr(durable, "sync", sync)
            durable.write_whole(path, b"the newer one's")

    monkeypatch.setattr(durable, "sync", replaced)
    assert not durable.write_once(path, b"the older one's")
    assert path.read_bytes() == b"the newer one's"


def test_what_could_not_be_written_to_its_end_is_not_there(
    tmp_path: Path, answer: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("link", errno.EPERM)
    path, sync = tmp_path / "once", durable.sync

    def full(descriptor: int) -> None:
        sync(descriptor)
        if path.exists():
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="full"):
        durable.write_once(path, b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_link_that_fails_for_another_reason_is_an_error(
    tmp_path: Path, answer: Callable[[str, int], None], number: int
) -> None:
    answer("link", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        durable.write_once(tmp_path / "once", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_sync_takes_files_and_one_that_fails_to_does_not(
    tmp_path: Path, answer: Callable[[str, int], None]
) -> None:
    answer("fsync", errno.EINVAL)
    durable.write_whole(tmp_path / "file", b"content")
    assert durable.write_once(tmp_path / "once", b"content")
    answer("fsync", errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        durable.write_whole(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_whose_files_cannot_be_renamed_is_noticed(
    tmp_path: Path, answer: Callable[[str, int], None]
) -> None:
    durable.check_takes_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
    answer("replace", errno.EOPNOTSUPP)
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        durable.check_takes_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
