"""Files that exist whole or not at all, also after a crash: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
"""Suffix of files under way. Their names start with a dot, so patterns such as ``shard-*.tar`` skip them."""
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR}
"""What file systems that have no such operation answer to fsync, most often of a folder."""
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
"""What those without hard links answer to ``link`` (exFAT, SMB, bucket mounts, some NFS servers)."""


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other process or thread uses."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name}.{owner}{TEMPORARY}")


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """Temporary files that killed processes left in ``folder``, of the file ``name`` or of any."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(p for p in folder.iterdir() if p.name.startswith(f".{name}") and p.suffix == TEMPORARY)
    return []


def publish(temporary: Path, path: Path) -> None:
    """Give a written and fsynced temporary file its name."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names created in ``folder`` survive a power loss, where the file system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        sync(number)
    finally:
        os.close(number)


def sync(descriptor: int) -> None:
    """Make what was written survive a power loss, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def check_takes_files(folder: Path) -> None:
    """See whether files can be made in a folder and renamed, as all here are; nothing is left in it.

    Raises:
        OSError: they cannot.
    """
    first = temporary_path(folder / "probe")
    second = first.with_name(f"{first.name}{TEMPORARY}")
    try:
        for path in (second, first):  # a rename replaces
            path.touch(exist_ok=False)
        os.replace(first, second)
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)


def _opened(path: Path) -> BinaryIO:
    return open(path, "wb")


@contextlib.contextmanager
def writing(path: Path, opened: Callable[[Path], BinaryIO] = _opened) -> Iterator[BinaryIO]:
    """Write a file; it takes its name when the block ends, and never does if the block raises.

    ``opened`` makes the file under its temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with opened(temporary) as file:
            yield file
            file.flush()
            sync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file; one of that name is replaced."""
    with writing(path) as file:
        file.write(content)


def write_once(path: Path, content: bytes) -> bool:
    """Create ``path`` with ``content`` unless it exists; of several processes one succeeds. Returns whether.

    Where the file system has no hard links, it has its name before all of its content for a moment, or for good
    after a crash in that moment: readers must tell that from a whole one. Such a file may be replaced
    (``write_whole``): a writer that hangs in between then finds that it has not created it.

    Raises:
        FileNotFoundError: its folder is not there. Nothing makes it: another process may just have removed it.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS or not temporary.exists():
            raise
        if not _created(path, content):
            return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _created(path: Path, content: bytes) -> bool:
    """:func:`write_once` without links."""
    try:
        with open(path, "xb", buffering=0) as file:
            try:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
                sync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        path.unlink()
                raise
    except FileExistsError:
        return False
    try:
        return path.read_bytes() == content  # it is another's if that one has replaced it meanwhile
    except FileNotFoundError:
        return False
