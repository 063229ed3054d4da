"""Files that exist whole or not at all, also after a crash: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
"""Suffix of files under way. Their names start with a dot, so patterns such as ``shard-*.tar`` skip them."""


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
    """Make names created in ``folder`` survive a power loss."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


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
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file; one of that name is replaced."""
    with writing(path) as file:
        file.write(content)


def write_once(path: Path, content: bytes) -> bool:
    """Create ``path`` with ``content`` unless it exists; of several processes one succeeds. Returns whether.

    Raises:
        FileNotFoundError: its folder is not there. Nothing makes it: another process may just have removed it.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True
