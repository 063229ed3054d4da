"""Shards at a URL: ranges of them are fetched ahead by threads and held until all their samples are read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from beit_dist.errors import MissingShardError, SampleError, StorageError
from beit_dist.storage.place import Buffer, Place
from beit_dist.stream.block_cache import BlockCache
from beit_dist.stream.counts import bytes_read

IN_FLIGHT = 8
"""Ranges that a process fetches at once. One stream from an object store brings 50 to 100 MB/s."""


class Extent(NamedTuple):
    """Consecutive samples of a shard."""

    shard: str
    offset: int
    """Bytes before the first of them."""
    samples: int
    stride: int
    """Bytes of each."""

    @property
    def range(self) -> tuple[str, int, int]:
        """Shard, offset and number of bytes."""
        return self.shard, self.offset, self.samples * self.stride


class RemoteReader:
    """Reads shards at a place, and holds what it is told will be read; not for use by two threads at once.

    Whoever knows what comes next calls :meth:`hold` early and :meth:`release` when the samples are read. What is
    not held is read all the same, by a request of its own. Can be pickled; threads and clients are those of the
    process that reads.
    """

    def __init__(self, place: Place, in_flight: int = IN_FLIGHT) -> None:
        self.place, self.in_flight = place, in_flight
        self.cache: BlockCache | None = None
        """Where what is held is looked for first, and kept."""
        self._begin()

    def _begin(self) -> None:
        self._held: dict[Extent, _Held] = {}
        self._samples: dict[tuple[str, int], Extent] = {}
        self._threads = _Threads(self.in_flight)

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "in_flight": self.in_flight, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def hold(self, extent: Extent) -> None:
        """Begin to fetch these samples, and serve their reads until :meth:`release` was called as often."""
        held = self._held.get(extent)
        if held is not None:
            held.users += 1
            return
        self._held[extent] = _Held(self._threads.submit(lambda: self._fetch(extent)))
        for sample in range(extent.samples):
            self._samples[extent.shard, extent.offset + sample * extent.stride] = extent

    def release(self, extent: Extent) -> None:
        """Forget these samples; harmless where :meth:`close` has done so."""
        held = self._held.get(extent)
        if held is None:
            return
        held.users -= 1
        if held.users:
            return
        del self._held[extent]
        held.content.cancel()  # in case it has not begun
        for sample in range(extent.samples):
            key = extent.shard, extent.offset + sample * extent.stride
            if self._samples.get(key) == extent:  # and not one that overlaps it, at the turn of an epoch
                del self._samples[key]

    def read_into(self, shard: str, offset: int, buffers: Sequence[memoryview], *, fresh: bool = False) -> None:
        """See :meth:`beit_dist.stream.readers.ShardReader.read_into`."""
        size = sum(buffer.nbytes for buffer in buffers)
        extent = self._samples.get((shard, offset))
        if fresh and extent is not None:
            if self.cache is not None:
                self.cache.drop(*extent.range)
            extent = None
        content = None if extent is None else self._content(extent)
        if extent is None or content is None or offset + size > extent.offset + extent.samples * extent.stride:
            content, start = self._read(shard, offset, size), 0
        else:
            start = offset - extent.offset
        whole = memoryview(content)
        for buffer in buffers:
            buffer[:] = whole[start : start + buffer.nbytes]
            start += buffer.nbytes

    def close(self) -> None:
        """Let go of what is held, and of the threads; the process's clients serve others, too."""
        for held in self._held.values():
            held.content.cancel()
        self._threads.close()
        self._begin()

    def _content(self, extent: Extent) -> Buffer | None:
        """What is held; None if it cannot be had whole, though some of its samples may be."""
        try:
            return self._held[extent].content.result()
        except StorageError:
            raise
        except (OSError, EOFError, SampleError):
            return None

    def _fetch(self, extent: Extent) -> Buffer:
        if self.cache is None:
            return self._read(*extent.range)
        content = self.cache.get(*extent.range)
        if content is not None:
            bytes_read.add("cache", len(content))
            return content
        content = self._read(*extent.range)
        self.cache.put(extent.shard, extent.offset, content)
        return content

    def _read(self, shard: str, offset: int, size: int) -> Buffer:
        try:
            content = self.place.read_range(shard, offset, size)
        except StorageError:
            raise
        except EOFError as error:
            raise SampleError(f"{error}; the file is cut short") from None
        except FileNotFoundError:
            raise MissingShardError(f"{self.place}/{shard}: not found") from None
        except OSError as error:
            raise SampleError(f"{self.place}/{shard}: byte {offset}: cannot be read ({error})") from None
        bytes_read.add("store", size)
        return content


@dataclass
class _Held:
    content: Future[Buffer]
    users: int = 1


class _Threads:
    """Runs what it is given, first come, first served, in daemon threads.

    Not a ThreadPoolExecutor, which a process waits for at its end: requests may be tried again for minutes.
    """

    def __init__(self, most: int) -> None:
        self._most, self._started = most, 0
        self._work: queue.SimpleQueue[tuple[Future[Buffer], Callable[[], Buffer]] | None] = queue.SimpleQueue()

    def submit(self, work: Callable[[], Buffer]) -> Future[Buffer]:
        future: Future[Buffer] = Future()
        self._work.put((future, work))
        if self._started < self._most:
            self._started += 1
            threading.Thread(target=self._run, name=f"fetch-{self._started}", daemon=True).start()
        return future

    def close(self) -> None:
        for _ in range(self._started):
            self._work.put(None)

    def _run(self) -> None:
        while (entry := self._work.get()) is not None:
            future, work = entry
            del entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work  # or what was read would be held until the next one comes
