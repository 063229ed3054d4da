"""Blocks of shards kept on a local disk, so that what one epoch fetched the next one need not.

The ranks of a host share one folder. A file holds one run of samples and behind it a mark of which one it is: a
file that was cut, or lies under another's name, is not taken. The bytes before the mark are not summed again here:
every sample's own crc32 is checked whenever it is read. Where one fails, the store is read, and the file goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from beit_dist.storage.durable import TEMPORARY, temporary_path
from beit_dist.storage.place import Buffer
from beit_dist.stream.counts import cache_lookups

_log = logging.getLogger(__name__)

_KEPT = 0.9
"""Of the limit, what stays when room is made: looking through the folder takes too long to do it each time."""
_LEFTOVER_SECONDS = 600.0
_PAUSE_SECONDS = 60.0
_USAGE = "usage"


class _File(NamedTuple):
    used: float  # when, Unix time
    size: int
    path: Path


class BlockCache:
    """A bounded folder of blocks; what was not used for longest goes first. Can be pickled.

    No failure is raised: a block that cannot be kept is fetched again, and that is all.

    Args:
        folder: shared by all processes of a host, by several data sets too.
        limit: bytes. Each process that is just writing a block may be over it by that block.
        digest: of the data set.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int, digest: str) -> None:
        self.folder, self.limit, self.digest = Path(folder), limit, digest
        self._pause_until = 0.0

    def get(self, shard: str, offset: int, size: int) -> Buffer | None:
        """The bytes of a shard from ``offset`` on, if they are kept."""
        path, mark = self._path(shard, offset, size), self._mark(shard, offset, size)
        content = bytearray(size + len(mark))
        try:
            with open(path, "rb", buffering=0) as file:
                got = 0
                while got < len(content) and (more := file.readinto(memoryview(content)[got:])):
                    got += more
                if got < len(content) or content[size:] != mark or file.read(1):
                    self.drop(shard, offset, size)
                    return None
            with contextlib.suppress(PermissionError):  # of a file system that keeps no times
                os.utime(path)
        except FileNotFoundError:
            cache_lookups.add("miss")
            return None
        except OSError as error:
            self._give_up(error)
            return None
        del content[size:]
        cache_lookups.add("hit")
        return content

    def put(self, shard: str, offset: int, content: Buffer) -> None:
        """Keep these bytes, and let go of others if there is no room."""
        path, mark = self._path(shard, offset, len(content)), self._mark(shard, offset, len(content))
        size = len(content) + len(mark)
        if size > _KEPT * self.limit or time.monotonic() < self._pause_until:
            return
        temporary = temporary_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # another process was faster
                return
            self._reserve(size)
            with open(temporary, "wb", buffering=0) as file:
                for piece in (content, mark):
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) :]
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._give_up(error)

    def drop(self, shard: str, offset: int, size: int) -> None:
        """Forget a block that turned out to be damaged, if it is kept."""
        with contextlib.suppress(OSError):
            self._path(shard, offset, size).unlink()
            cache_lookups.add("damaged")

    def remove_leftovers(self) -> None:
        """Remove what killed processes were writing."""
        for path in self._paths():
            with contextlib.suppress(OSError):
                if path.suffix == TEMPORARY and time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()

    def _path(self, shard: str, offset: int, size: int) -> Path:
        return self.folder / self.digest[:16] / f"{shard.replace('/', '-')}.{offset}+{size}"

    def _mark(self, shard: str, offset: int, size: int) -> bytes:
        return hashlib.sha256(f"{self.digest}\n{shard}\n{offset}\n{size}".encode()).digest()

    def _paths(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for folder in self.folder.iterdir():
                if folder.is_dir():
                    yield from folder.iterdir()

    def _reserve(self, size: int) -> None:
        """Count ``size`` bytes more; where they would be too many, look what there is and remove the oldest."""
        with self._usage() as file:
            text = os.pread(file, 32, 0).strip()
            used = int(text) if text.isdigit() else None
            if used is None or used + size > self.limit:
                used = self._make_room(size)
            os.pwrite(file, b"%-32d" % (used + size), 0)

    @contextmanager
    def _usage(self) -> Iterator[int]:
        """The file that has the bytes in use, for this process alone meanwhile.

        A process that is killed on the way leaves a number that is too high, never one that is too low.
        """
        file = os.open(self.folder / _USAGE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _make_room(self, size: int) -> int:
        """Remove what was not used for longest until ``size`` fits well; the bytes that are left."""
        self.remove_leftovers()
        files = []
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                files.append(_File(found.st_mtime, found.st_size, path))
        used = sum(file.size for file in files)
        if used + size <= self.limit:
            return used
        for file in sorted(files):
            if used + size <= _KEPT * self.limit:
                break
            if file.path.suffix != TEMPORARY:
                file.path.unlink(missing_ok=True)
                used -= file.size
        return used

    def _give_up(self, error: OSError) -> None:
        """Keep nothing new for a while: a full disk costs the cache, not the run."""
        cache_lookups.add("failed")
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = " Lower loader.cache_gib, or free some space." if full else ""
        if not self._pause_until:  # once a process
            _log.warning(
                "loader.cache_dir: %s: %s. Training continues without the cache.%s", self.folder, error, hint
            )
        self._pause_until = time.monotonic() + _PAUSE_SECONDS
