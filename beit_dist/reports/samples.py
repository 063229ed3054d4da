"""Samples as they lie in shards, read one by one and checked: for pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import DataError, SampleError, StorageError
from beit_dist.images.decoding import unpatchify
from beit_dist.shards.manifest import Manifest
from beit_dist.shards.sample import JSON_BYTES, SampleLayout, decode_json_start, parse_key, sample_crc
from beit_dist.storage.place import Place

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ShardSample:
    """A sample as it lies in a shard. P patches, in a square grid."""

    key: str
    patches: Pixels
    """(P, patch_size² · 3)"""
    tokens: NDArray[np.int16]
    """(P,)"""
    notes: dict[str, Any]
    """Its json: source, label, box, flip."""

    @property
    def view(self) -> int:
        """Which of the image's views it is."""
        return parse_key(self.key)[0]

    @property
    def sample_id(self) -> int:
        """Of the image; the same in all views."""
        return parse_key(self.key)[1]

    @property
    def source(self) -> str:
        """The image's name in its folder or tar."""
        return str(self.notes.get("source", f"sample {self.sample_id}"))

    @property
    def image(self) -> Pixels:
        """(image_size, image_size, 3)"""
        return unpatchify(self.patches, round((self.patches.shape[1] / 3) ** 0.5))


def read_sample(place: Place, layout: SampleLayout, shard: str, row: int) -> ShardSample:
    """Read a sample and compare it with its checksum.

    Raises:
        DataError: it is damaged.
        OSError, EOFError: it cannot be read.
    """
    raw = memoryview(bytearray(layout.stride))
    place.read_into(shard, row * layout.stride, raw)
    text = bytes(raw[layout.json_start : layout.json_start + JSON_BYTES])
    crc, key = decode_json_start(text)
    patches = raw[layout.patches_start : layout.patches_start + layout.patches_nbytes]
    tokens = raw[layout.tokens_start : layout.tokens_start + layout.tokens_nbytes]
    if (got := sample_crc(key, patches, tokens)) != crc:
        raise SampleError(f"crc32: got {got:08x}, expected {crc:08x}")
    parse_key(key)
    try:
        notes = dict(json.loads(text))
    except ValueError as error:
        raise SampleError(f"json: {error}") from None
    numbers = np.frombuffer(tokens, "<i2").astype(np.int16)
    if numbers.min() < 0 or numbers.max() >= layout.vocabulary:
        raise SampleError(f"tokens: got {numbers.min()}..{numbers.max()}, expected 0..{layout.vocabulary - 1}")
    pixels = np.frombuffer(patches, np.uint8).reshape(layout.patches, layout.patch_bytes)
    return ShardSample(key, pixels, numbers, notes)


def read_spread(place: Place, manifest: Manifest, count: int) -> list[ShardSample]:
    """Up to ``count`` samples spread evenly over the data set's first view.

    Raises:
        SampleError: a sample is damaged.
    """
    samples = []
    for index in spread(manifest.samples, count):
        shard, row = located(manifest, index)
        name = manifest.shards[shard].name
        try:
            samples.append(read_sample(place, manifest.layout, name, row))
        except StorageError:
            raise
        except (EOFError, OSError, DataError) as error:
            raise SampleError(f"{name}, sample {row}: {error}. beit check tells how much is damaged.") from None
    return samples


def spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` things at even distances; all, if there are no more."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def located(manifest: Manifest, index: int) -> tuple[int, int]:
    """Number of the shard in its view, and the row in it, of the image ``index``: the same in every view."""
    for number, shard in enumerate(manifest.view_shards(0)):
        if index < shard.samples:
            return number, index
        index -= shard.samples
    raise IndexError(index)
