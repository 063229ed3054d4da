"""One shard's files in all views on their way: nobody sees them until they are published."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import SampleError, UserError
from beit_dist.shards.manifest import ShardInfo, shard_name
from beit_dist.shards.sample import SampleNotes, sample_key
from beit_dist.shards.statistics import Tally
from beit_dist.shards.writer import ShardWriter
from beit_dist.storage.durable import leftovers
from beit_dist.storage.place import Place
from beit_dist.tokenizing.decoding import Decoded
from beit_dist.tokenizing.job import Job


class ShardFiles:
    """Locally they have temporary names; in a store their uploads are not complete.

    Leaving the block without :meth:`publish` drops them. Files of the same shard that a killed worker left are
    removed at the start.
    """

    def __init__(self, out: Place, shard: int, job: Job) -> None:
        self._out, self._layout = out, job.layout
        self.tally = Tally.empty(job.layout)
        """Of the samples of all views."""
        self._names = [shard_name(view, shard) for view in range(job.views)]
        self._stack = ExitStack()
        self._writers: list[ShardWriter] = []

    def __enter__(self) -> ShardFiles:
        for name in self._names:
            if self._out.is_local:
                path = (self._out / name).path
                for old in leftovers(path.parent, path.name):
                    old.unlink(missing_ok=True)
            file = self._stack.enter_context(self._out.writing(name))
            self._writers.append(ShardWriter(file, self._layout))
        return self

    def write(self, batch: list[Decoded], tokens: list[NDArray[np.int16]]) -> None:
        """Append the images of a batch.

        Args:
            tokens: for each view int16 (B, grid, grid); rows beyond the batch are padding.
        """
        for view, writer in enumerate(self._writers):
            for row, decoded in enumerate(batch):
                listed, made = decoded.listed, decoded.views[view]
                notes = SampleNotes(listed.name, listed.label, made.box, made.flip)
                writer.write(sample_key(view, listed.sample_id), made.image, tokens[view][row], notes)
                self.tally.add(tokens[view][row], made.image)

    def publish(self) -> tuple[ShardInfo, ...]:
        """Make all files durable and give them their names; a shard without samples leaves no file."""
        written = [writer.close() for writer in self._writers]
        if written[0].samples == 0:
            return ()
        try:
            self._stack.close()
        except FileNotFoundError as error:
            if isinstance(error, UserError):
                raise
            raise SampleError(
                f"{self._out / self._names[0]}: its temporary file is gone: another worker with the same index is "
                "making the same shard. Let one of them finish"
            ) from None
        return tuple(
            ShardInfo(name, shard.bytes, shard.samples, shard.sha256)
            for name, shard in zip(self._names, written, strict=True)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stack:
                raise _DroppedError  # what is still open must not be published
        except _DroppedError:
            return


class _DroppedError(Exception):
    pass
