"""Reading ranges of shards: one small interface, so that local and remote storage differ nowhere else."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

from beit_dist.errors import MissingShardError, SampleError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import as_place
from beit_dist.storage.place import Place
from beit_dist.stream.counts import bytes_read
from beit_dist.stream.fetching import RemoteReader

_OPEN_FILES = 64
_NBYTES = attrgetter("nbytes")


class ShardReader(Protocol):
    """Reads byte ranges of shards. Can be pickled; whatever it opens, it opens in the process that reads."""

    def read_into(self, shard: str, offset: int, buffers: Sequence[memoryview], *, fresh: bool = False) -> None:
        """Fill ``buffers`` one after another with the bytes of ``shard`` from ``offset`` on.

        Args:
            shard: its name in the data set.
            offset: in bytes.
            buffers: to be filled.
            fresh: take nothing that was read before, as it turned out to be damaged.

        Raises:
            SampleError: the bytes are not all there, or cannot be read.
            StorageError: a store does not answer, or refuses.
        """

    def close(self) -> None:
        """Let go of what is open; reading opens it again."""


def open_reader(where: str | os.PathLike[str] | Place, access: Access | None = None) -> ShardReader:
    """A reader of the data set in a folder: a path, a URL, or the place itself.

    Raises:
        ConfigError: it is no place, or holds credentials.
    """
    place = as_place(where, access)
    return LocalReader(str(place.path)) if place.is_local else RemoteReader(place)


class LocalReader:
    """Shards in a folder. Keeps up to 64 of them open; not for use by two threads at once.

    Reads with ``preadv`` rather than through a memory map, which would end the process with SIGBUS where a file
    turns out to be shorter than it was.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def read_into(self, shard: str, offset: int, buffers: Sequence[memoryview], *, fresh: bool = False) -> None:
        """See :meth:`ShardReader.read_into`; at most 1,024 buffers (IOV_MAX)."""
        expected = sum(map(_NBYTES, buffers))
        got = 0
        try:
            descriptor = self._descriptor(shard)
            if fresh:  # have the system read the disk again, where it can
                os.posix_fadvise(descriptor, offset, expected, os.POSIX_FADV_DONTNEED)
            got = os.preadv(descriptor, buffers, offset)
            while got < expected:  # a short read is legal; only an empty one means the end
                more = os.preadv(descriptor, _after(buffers, got), offset + got)
                if not more:
                    break
                got += more
        except OSError as error:
            self._forget(shard)  # a second attempt opens it anew, which heals a stale handle
            if isinstance(error, FileNotFoundError):
                raise MissingShardError(f"{self._path(shard)}: not found") from None
            raise SampleError(f"{self._path(shard)}: byte {offset}: cannot be read ({error.strerror})") from None
        if got != expected:
            self._forget(shard)
            raise SampleError(
                f"{self._path(shard)}: byte {offset}: got {got} bytes, expected {expected}; the file is cut short"
            )
        bytes_read.add("disk", expected)

    def close(self) -> None:
        """Close every open shard."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: str) -> int:
        descriptor = self._open.get(shard)
        if descriptor is not None:
            self._open.move_to_end(shard)
            return descriptor
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        descriptor = self._open[shard] = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        return descriptor

    def _forget(self, shard: str) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def _path(self, shard: str) -> str:
        return os.path.join(self.root, shard)


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """``buffers`` without their first ``count`` bytes."""
    rest = []
    for buffer in buffers:
        rest.append(buffer[min(count, buffer.nbytes) :])
        count = max(0, count - buffer.nbytes)
    return rest
