"""A worker: makes every N-th shard of the list, all views together, and commits each when it is whole.

A killed worker starts again with what is not committed. Nothing in a shard depends on the number of workers:
shards are cut from the frozen list, and encoder batches never cross a shard and have one padded shape.

The stages overlap, each a bounded step ahead of the next, across the shards' borders: images are read and decoded
in processes, collected to batches in a thread, encoded in another; this one writes and hashes; and one more
publishes and commits the shard before.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import SpaceError
from beit_dist.storage.access import Access
from beit_dist.storage.retries import counts
from beit_dist.tokenizing.ahead import ahead
from beit_dist.tokenizing.commits import Commit, read_commits, sizes_of, write_commit
from beit_dist.tokenizing.decoding import Decoded, Decoders, Recipe
from beit_dist.tokenizing.encoder import Encoder
from beit_dist.tokenizing.metrics import Metrics
from beit_dist.tokenizing.parts import Part
from beit_dist.tokenizing.progress import Progress
from beit_dist.tokenizing.rejected import Rejected, check_rejected
from beit_dist.tokenizing.shard_files import ShardFiles

_BATCHES_AHEAD = 2
_ENCODED_AHEAD = 1


class WorkerReport(NamedTuple):
    """What a worker did: shards (of all views together) and images."""

    made: int
    kept: int
    images: int
    rejected: tuple[Rejected, ...]
    """Of all its shards, the kept ones too."""

    def plus(self, other: WorkerReport) -> WorkerReport:
        """Of both."""
        made, kept, images = self.made + other.made, self.kept + other.kept, self.images + other.images
        return WorkerReport(made, kept, images, self.rejected + other.rejected)


class _Batch(NamedTuple):
    """Images of one shard that follow one another."""

    usable: list[Decoded]
    rejected: list[Rejected]
    """Those in between."""
    last: bool
    """Of its shard."""
    padded: tuple[NDArray[np.uint8], ...] = ()
    """For each view what the encoder takes, with zeros for the images that a full batch would have."""


class _Encoded(NamedTuple):
    batch: _Batch
    tokens: list[NDArray[np.int16]]
    """For each view, padded to the job's batch; empty if no image is usable."""


class _Written(NamedTuple):
    """A shard whose last sample is written, and that is not published yet."""

    shard: int
    files: ShardFiles
    to_be_closed: ExitStack
    rejected: list[Rejected]


class Worker:
    """Makes the shards ``index``, ``index + count``, ... of a job.

    Args:
        part: of a job that is recorded, with the list frozen.
        encoder: the job's tokenizer.
        decoders: decoding processes; 0 decodes in this one.
        max_rejected: the worker stops when it alone rejected more images.
        rejected: what it rejected in the job's parts before, which counts.
        access: how images at URLs are reached.
        metrics: told of the work.
        warm_up: called when there is something to make, before the clock starts.
    """

    def __init__(
        self,
        part: Part,
        encoder: Encoder,
        *,
        index: int,
        count: int,
        decoders: int,
        max_rejected: int,
        rejected: Sequence[Rejected] = (),
        access: Access | None = None,
        metrics: Metrics | None = None,
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        self._warm_up = warm_up
        self._out, self._job, self._sources, self._encoder = part.out, part.job, part.sources, encoder
        self._shards = range(index, part.sources.shards, count)
        self._decoders, self._access = decoders, access
        self._max_rejected, self._rejected_before = max_rejected, rejected
        self._metrics = metrics or Metrics(index)
        self._name = f"worker {index} of {count}" if count > 1 else "tokenizing"
        if part.name:
            self._name += f", {part.name}"

    def run(self) -> WorkerReport:
        """Make what is not committed yet.

        Raises:
            DataError: a commit is another job's, an image changed, or too many images are rejected.
            SampleError, StorageError: storage or a decoding process failed; another attempt may succeed.
            SpaceError: the disk has less room than this worker's shards need.
        """
        kept = self._trusted_commits()
        missing = [shard for shard in self._shards if shard not in kept]
        self._check_space(missing)
        rejected = [entry for commit in kept.values() for entry in commit.rejected]
        before = len(rejected) + len(self._rejected_before)
        check_rejected(before, self._max_rejected, rejected)
        if missing and self._warm_up is not None:
            self._warm_up()
        images, images_kept = (sum(map(self._sources.entries_of, shards)) for shards in (self._shards, kept))
        with Progress(
            self._name, (images, images_kept), (len(self._shards), len(kept)), self._metrics
        ) as progress:
            if missing:
                rejected += self._make_all(missing, before, progress)
        return WorkerReport(len(missing), len(kept), images - images_kept, tuple(rejected))

    def _make_all(self, shards: Sequence[int], rejected_before: int, progress: Progress) -> list[Rejected]:
        job, rejected = self._job, list[Rejected]()
        with ExitStack() as stack:
            decoders = stack.enter_context(Decoders(Recipe.of(job), self._decoders, self._access, self._metrics))
            publisher = stack.enter_context(ThreadPoolExecutor(1))  # ends what is under way, also when we fail
            batches = ahead(self._batches(shards, decoders), _BATCHES_AHEAD)
            stopped = threading.Event()
            encoded = stack.enter_context(closing(ahead(self._encode(batches, stopped), _ENCODED_AHEAD, stopped)))
            publishing: deque[Future[None]] = deque()
            for shard in shards:
                written = self._write(shard, encoded, progress)
                publishing.append(publisher.submit(self._publish, written, progress))
                rejected += written.rejected
                over_limit = rejected_before + len(rejected) > self._max_rejected
                while publishing and (len(publishing) > 1 or over_limit):
                    publishing.popleft().result()
                check_rejected(rejected_before + len(rejected), self._max_rejected, written.rejected)
            publishing.popleft().result()
        return rejected

    def _batches(self, shards: Sequence[int], decoders: Decoders) -> Iterator[_Batch]:
        decoded = decoders.decode(listed for shard in shards for listed in self._sources.read(shard))
        for shard in shards:
            batch = _Batch([], [], last=False)
            for one in islice(decoded, self._sources.entries_of(shard)):
                if one.reason:
                    batch.rejected.append(Rejected(one.listed.sample_id, one.listed.name, one.reason, one.kind))
                    continue
                batch.usable.append(one)
                if len(batch.usable) == self._job.batch:
                    yield self._padded(batch)
                    batch = _Batch([], [], last=False)
            yield self._padded(batch._replace(last=True))

    def _padded(self, batch: _Batch) -> _Batch:
        """Here, in the thread before the encoder's, so that the device does not wait for the copies."""
        side, views = self._job.token_size, range(self._job.views if batch.usable else 0)
        padded = np.zeros((len(views), self._job.batch, side, side, 3), np.uint8)
        for row, decoded in enumerate(batch.usable):
            for view in views:
                padded[view, row] = decoded.views[view].token_image
        return batch._replace(padded=tuple(padded))

    def _encode(self, batches: Generator[_Batch, None, None], stopped: threading.Event) -> Iterator[_Encoded]:
        # Closed here and not by the garbage collector: in the thread of the store's client that would wait for a
        # stage which waits for that client.
        with closing(batches):
            for batch in batches:
                tokens = []
                with self._metrics.timed("encode"):
                    for padded in batch.padded:
                        if stopped.is_set():  # on Ctrl-C: all views of a batch can take minutes
                            return
                        tokens.append(self._encoder(padded))
                yield _Encoded(batch, tokens)

    def _write(self, shard: int, encoded: Iterator[_Encoded], progress: Progress) -> _Written:
        rejected: list[Rejected] = []
        with ExitStack() as stack:
            files = stack.enter_context(ShardFiles(self._out, shard, self._job))
            for batch, tokens in encoded:
                with self._metrics.timed("write"):
                    files.write(batch.usable, tokens)
                for entry in batch.rejected:
                    self._metrics.rejected(entry.kind)
                rejected += batch.rejected
                progress.images(len(batch.usable) + len(batch.rejected))
                self._metrics.retried(counts.take())
                if batch.last:
                    break
            to_be_closed = stack.pop_all()
        return _Written(shard, files, to_be_closed, rejected)

    def _publish(self, written: _Written, progress: Progress) -> None:
        with written.to_be_closed, self._metrics.timed("publish"):
            files, rejected = written.files.publish(), tuple(written.rejected)
            commit = Commit(written.shard, self._job.digest, files, rejected, written.files.tally)
            write_commit(self._out, commit)
        self._metrics.retried(counts.take())
        progress.shard()

    def _trusted_commits(self) -> dict[int, Commit]:
        """What an earlier start has committed, and is there."""
        found = {commit.shard: commit for commit in read_commits(self._out, self._shards) if commit is not None}
        sizes = sizes_of(self._out, found.values())
        trusted = {shard: commit for shard, commit in found.items() if not commit.damage(sizes)}
        for commit in trusted.values():
            commit.check_job(self._out, self._job.digest)
        return trusted

    def _check_space(self, shards: Sequence[int]) -> None:
        if not self._out.is_local:
            return
        sizes = (self._job.layout.shard_bytes(self._sources.entries_of(shard)) for shard in shards)
        needed, free = self._job.views * sum(sizes), shutil.disk_usage(self._out.path).free
        if needed > free:
            raise SpaceError(
                f"{self._out}: got {free / 1e6:,.1f} MB of free space, expected {needed / 1e6:,.1f} MB for this "
                f"worker's {len(shards)} shards × {self._job.views} views. Use another --out, or fewer --views"
            )
