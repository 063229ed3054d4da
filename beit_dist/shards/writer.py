"""The shard format, in one place: a sample's layout, the writer of shards, and the manifest that commits them.

A shard is a plain USTAR tar that ``tar`` and ``webdataset`` open. Each sample is three members of constant size
(json, patches, tokens), so sample i starts at ``i · stride`` and can be read by position, without an index.
"""

from __future__ import annotations

import hashlib
import io
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from beit_dist.errors import SampleError
from beit_dist.shards.sample import BLOCK, MEMBERS, SampleLayout, SampleNotes, encode_sample, padded


class WrittenShard(NamedTuple):
    """What :meth:`ShardWriter.close` found to have been written."""

    bytes: int
    samples: int
    sha256: str


class ShardWriter:
    """Writes one shard to an open binary file, which stays open: the caller makes it durable.

    Every member's offset is checked against the layout, since a tar writer may add headers of its own (for
    long names, large numbers or fractional times) that would silently break the constant stride.
    """

    def __init__(self, stream: BinaryIO, layout: SampleLayout) -> None:
        self.layout, self.samples = layout, 0
        self._sink = _HashingSink(stream)
        # The integer 0, not 0.0: tarfile writes a float time as an extra PAX header.
        self._tar = wds.TarWriter(self._sink, encoder=False, mtime=0)

    def write(self, key: str, patches: NDArray[np.uint8], tokens: NDArray[np.int16], notes: SampleNotes) -> None:
        """Append a sample; arguments and errors are those of :func:`encode_sample`."""
        members = encode_sample(self.layout, key, patches, tokens, notes)
        start = self.samples * self.layout.stride
        places = zip(MEMBERS, self.layout.member_starts, self.layout.member_sizes, strict=True)
        for member, data_start, size in places:
            self._tar.write({"__key__": key, member: members[member]})
            end, expected = self._tar.tarstream.offset, start + data_start + padded(size, BLOCK)
            if end != expected:
                raise SampleError(
                    f"{key}.{member}: the tar writer ended it at byte {end}, expected {expected}. "
                    "This webdataset or Python writes other tar headers than the format allows."
                )
        self._tar.tarstream.members.clear()  # tarfile remembers each header written: megabytes by the shard's end
        self.samples += 1

    def close(self) -> WrittenShard:
        """Write the closing blocks; the stream stays open."""
        self._tar.close()
        expected = self.layout.shard_bytes(self.samples)
        if self._sink.written != expected:
            raise SampleError(f"shard: the tar writer wrote {self._sink.written} bytes, expected {expected}")
        return WrittenShard(self._sink.written, self.samples, self._sink.digest.hexdigest())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


class _HashingSink(io.RawIOBase):
    """Passes what the tar writer writes on to a file; counts and hashes it on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.written = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        if self._stream.closed:  # an abandoned tar writer flushes once more when it is collected
            return len(data)
        self._stream.write(data)
        self.digest.update(data)
        self.written += len(data)
        return len(data)
