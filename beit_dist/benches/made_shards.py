"""Shards of noise, in the layout of the released models: what their pixels are makes no difference to speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from beit_dist.shards.manifest import Manifest, ShardInfo, shard_name
from beit_dist.shards.sample import SampleLayout, SampleNotes, sample_key
from beit_dist.shards.writer import ShardWriter

LAYOUT = SampleLayout(224, 16, 8192)


def write_shards(folder: Path, shards: int, per_shard: int) -> Manifest:
    """A data set of one view in ``folder``, which is there."""
    random = np.random.default_rng(0)
    infos = []
    (folder / "v00").mkdir()
    for index in range(shards):
        with (folder / shard_name(0, index)).open("wb") as file:
            writer = ShardWriter(file, LAYOUT)
            for number in range(per_shard):
                patches = random.integers(0, 256, (LAYOUT.patches, LAYOUT.patch_bytes), np.uint8)
                tokens = random.integers(0, LAYOUT.vocabulary, (LAYOUT.grid, LAYOUT.grid)).astype(np.int16)
                key = sample_key(0, index * per_shard + number)
                writer.write(key, patches, tokens, SampleNotes("made.png"))
            written = writer.close()
        infos.append(ShardInfo(shard_name(0, index), written.bytes, written.samples, written.sha256))
    manifest = Manifest(LAYOUT, "0" * 64, 1, 0, 0, tuple(infos))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest
