"""A worker: makes every N-th shard of the list, all views together, and commits each when it is whole.

A killed worker starts again with what is not committed. Nothing in a shard depends on the number of workers:
shards are cut from the frozen list, and encoder batches never cross a shard and have one padded shape.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from beit_dist.data.shards import SampleNotes, ShardInfo, ShardWriter, WrittenShard, sample_key, shard_name
from beit_dist.durable import leftovers, publish, temporary_path
from beit_dist.errors import SampleError, SpaceError
from beit_dist.tokenizing.commits import Commit, Rejected, check_rejected, read_commit, write_commit
from beit_dist.tokenizing.decoding import Decoded, Decoders, Recipe
from beit_dist.tokenizing.encoder import Encoder
from beit_dist.tokenizing.job import Job
from beit_dist.tokenizing.sources import SourceList


class WorkerReport(NamedTuple):
    """What a worker did: shards (of all views together) and images."""

    made: int
    kept: int
    images: int
    rejected: int


class Worker:
    """Makes the shards ``index``, ``index + count``, ... of a job.

    Args:
        out: the data set's folder, with the job recorded and the list frozen.
        encoder: the job's tokenizer.
        decoders: decoding processes; 0 decodes in this one.
        max_rejected: the worker stops when it alone rejected more images.
    """

    def __init__(
        self,
        out: Path,
        job: Job,
        sources: SourceList,
        encoder: Encoder,
        *,
        index: int,
        count: int,
        decoders: int,
        max_rejected: int,
    ) -> None:
        self._out, self._job, self._sources, self._encoder = out, job, sources, encoder
        self._shards = range(index, sources.shards, count)
        self._decoders, self._max_rejected = decoders, max_rejected

    def run(self) -> WorkerReport:
        """Make what is not committed yet.

        Raises:
            DataError: a commit is another job's, an image changed, or too many images are rejected.
            SampleError: storage or a decoding process failed; another attempt may succeed.
            SpaceError: the disk has less room than this worker's shards need.
        """
        job = self._job
        commits = [self._trusted_commit(shard) for shard in self._shards]
        done = [commit for commit in commits if commit is not None]
        self._check_space([shard for shard, commit in zip(self._shards, commits, strict=True) if commit is None])
        rejected = sum(len(commit.rejected) for commit in done)
        recipe = Recipe(job.views, job.image_size, job.token_size, job.patch_size, job.augment, job.seed)
        entries = [self._sources.entries_of(shard) for shard in self._shards]
        kept = sum(self._sources.entries_of(commit.shard) for commit in done)
        with (
            Decoders(recipe, self._decoders if len(done) < len(commits) else 0, 2 * job.batch) as decoders,
            tqdm(total=sum(entries), initial=kept, desc="tokenizing", unit=" images", disable=None) as bar,
        ):
            for shard, commit in zip(self._shards, commits, strict=True):
                if commit is None:
                    made = self._make(shard, decoders, bar)
                    rejected += len(made.rejected)
                    check_rejected(rejected, self._max_rejected, made.rejected)
        return WorkerReport(len(commits) - len(done), len(done), sum(entries) - kept, rejected)

    def _check_space(self, shards: list[int]) -> None:
        sizes = (self._job.layout.shard_bytes(self._sources.entries_of(shard)) for shard in shards)
        needed, free = self._job.views * sum(sizes), shutil.disk_usage(self._out).free
        if needed > free:
            raise SpaceError(
                f"{self._out}: got {free / 1e9:.1f} GB of free space, expected {needed / 1e9:.1f} GB for this "
                f"worker's {len(shards)} shards × {self._job.views} views. Use another --out, or fewer --views"
            )

    def _trusted_commit(self, shard: int) -> Commit | None:
        commit = read_commit(self._out, shard)
        if commit is None or commit.damage(self._out):
            return None
        commit.check_job(self._out, self._job.digest)
        return commit

    def _make(self, shard: int, decoders: Decoders, bar: tqdm[Any]) -> Commit:
        rejected: list[Rejected] = []
        batch: list[Decoded] = []
        with _ShardFiles(self._out, shard, self._job) as files:
            for decoded in decoders.decode(self._sources.read(shard)):
                bar.update()
                if decoded.reason:
                    rejected.append(Rejected(decoded.source.sample_id, decoded.source.name, decoded.reason))
                    continue
                batch.append(decoded)
                if len(batch) == self._job.batch:
                    self._write(batch, files)
                    batch.clear()
            if batch:
                self._write(batch, files)
            commit = Commit(shard, self._job.digest, files.publish(), tuple(rejected))
        write_commit(self._out, commit)
        return commit

    def _write(self, batch: list[Decoded], files: _ShardFiles) -> None:
        side = self._job.token_size
        padded = np.zeros((self._job.batch, side, side, 3), np.uint8)
        for view, writer in enumerate(files.writers):
            for row, decoded in enumerate(batch):
                padded[row] = decoded.views[view].token_image
            tokens = self._encoder(padded)
            for row, decoded in enumerate(batch):
                source, made = decoded.source, decoded.views[view]
                notes = SampleNotes(source.name, source.label, made.box, made.flip)
                writer.write(sample_key(view, source.sample_id), made.image, tokens[row], notes)


class _ShardFiles:
    """One shard's files in all views, under temporary names until :meth:`publish`."""

    def __init__(self, out: Path, shard: int, job: Job) -> None:
        self.writers: list[ShardWriter] = []
        self._names = [shard_name(view, shard) for view in range(job.views)]
        self._paths = [out / name for name in self._names]
        self._temporary = [temporary_path(path) for path in self._paths]
        self._files: list[BinaryIO] = []
        self._stack = ExitStack()
        self._layout = job.layout

    def __enter__(self) -> _ShardFiles:
        for path, temporary in zip(self._paths, self._temporary, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            for old in leftovers(path.parent, path.name):
                old.unlink(missing_ok=True)
            file = self._stack.enter_context(open(temporary, "wb"))
            self._files.append(file)
            self.writers.append(ShardWriter(file, self._layout))
        return self

    def publish(self) -> tuple[ShardInfo, ...]:
        """Make all files durable and give them their names; a shard without samples leaves no file."""
        written = [writer.close() for writer in self.writers]
        if written[0].samples == 0:
            return ()
        for file, temporary, path in zip(self._files, self._temporary, self._paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            try:
                publish(temporary, path)
            except FileNotFoundError:
                raise SampleError(
                    f"{path}: its temporary file is gone: another worker with the same index is making the same "
                    "shard. Let one of them finish"
                ) from None
        return tuple(_info(name, shard) for name, shard in zip(self._names, written, strict=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)


def _info(name: str, shard: WrittenShard) -> ShardInfo:
    return ShardInfo(name, shard.bytes, shard.samples, shard.sha256)
