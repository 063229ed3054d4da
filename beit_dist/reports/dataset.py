"""What a data set holds, from a bounded number of its samples: counts, tokens, labels, and a sheet of pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.data.images import unpatchify
from beit_dist.data.sample import JSON_BYTES, SampleLayout, decode_json_start, parse_key, sample_crc
from beit_dist.data.shards import Manifest
from beit_dist.errors import DataError, SampleError, StorageError, printable
from beit_dist.storage.place import Place

Pixels = NDArray[np.uint8]
_READ_AT_ONCE = 16
_MOST = 10
"""Entries of a list of the most frequent."""


class InspectedSample(NamedTuple):
    """A sample that was looked at."""

    key: str
    image: Pixels
    """(image_size, image_size, 3)"""
    tokens: NDArray[np.int16]
    """(grid, grid)"""
    notes: dict[str, Any]
    """Its json: source, label, box, flip."""


@dataclass
class Inspection:
    """A data set's manifest, and what was found in the samples that were looked at."""

    manifest: Manifest
    where: str
    looked_at: int = 0
    damaged: list[str] = field(default_factory=list)
    token_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(vocabulary,)"""
    distinct: int = 0
    """Sum over the samples of their distinct tokens."""
    labels: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    """First folder of the sources' names."""
    flipped: int = 0
    colour_sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 3)))
    """Sums over the samples of each channel's mean and mean square, of values in [0, 1]."""
    sheet: list[InspectedSample] = field(default_factory=list)
    """Some of the samples, for pictures."""

    @property
    def entropy(self) -> float:
        """Of the tokens, in nats."""
        shares = self.token_counts[self.token_counts > 0] / max(1, self.token_counts.sum())
        return float(-(shares * np.log(shares)).sum())

    def facts(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON takes it."""
        manifest, layout, count = self.manifest, self.manifest.layout, max(1, self.looked_at)
        total, most = max(1, int(self.token_counts.sum())), np.argsort(-self.token_counts, kind="stable")[:_MOST]
        mean, square = self.colour_sums / count
        sizes = [shard.samples for shard in manifest.view_shards(0)]
        return {
            "where": self.where,
            "digest": manifest.digest,
            "samples": manifest.samples,
            "views": manifest.views,
            "rejected": manifest.rejected,
            "write_seed": manifest.write_seed,
            "shards": len(manifest.shards),
            "samples_of_a_shard": [min(sizes), max(sizes)],
            "bytes": sum(shard.bytes for shard in manifest.shards),
            "image_size": layout.image_size,
            "patch_size": layout.patch_size,
            "grid": layout.grid,
            "tokenizer": manifest.tokenizer,
            "vocabulary": layout.vocabulary,
            "looked_at": self.looked_at,
            "damaged": self.damaged,
            "tokens": {
                "seen": int(self.token_counts.sum()),
                "used": int((self.token_counts > 0).sum()),
                "perplexity": math.exp(self.entropy),
                "entropy_nats": self.entropy,
                "distinct_of_a_sample": self.distinct / count,
                "most_frequent": [
                    [int(t), float(self.token_counts[t] / total)] for t in most if self.token_counts[t]
                ],
            },
            "labels": {"distinct": len(self.labels), "most_frequent": self.labels.most_common(_MOST)},
            "sources": {"folders": len(self.folders), "most_frequent": self.folders.most_common(_MOST)},
            "flipped_share": self.flipped / count,
            "colour_mean": mean.round(4).tolist(),
            "colour_deviation": np.sqrt(np.maximum(0, square - mean**2)).round(4).tolist(),
        }


def inspect(
    place: Place, manifest: Manifest, samples: int, pictures: int, progress: Callable[[], object] = lambda: None
) -> Inspection:
    """Look at up to ``samples`` samples, spread evenly over all shards of all views, and keep some for pictures.

    Damaged samples are listed and left out.

    Raises:
        StorageError: the store does not answer, or refuses.
        DataError: no sample could be read.
    """
    found = Inspection(manifest, str(place))
    found.token_counts = np.zeros(manifest.layout.vocabulary, np.int64)
    picks = _spread(manifest, samples)
    kept = {index * len(picks) // pictures for index in range(min(pictures, len(picks)))} if pictures else set()
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        read = pool.map(lambda pick: _try_read(place, manifest.layout, *pick), picks)
        for number, sample in enumerate(read):
            progress()
            if isinstance(sample, str):
                found.damaged.append(sample)
                continue
            _count(found, sample)
            if number in kept:
                found.sheet.append(sample)
    if not found.looked_at:
        raise DataError(
            f"{place}: none of {len(picks)} samples can be read: {found.damaged[0]}. Run check_shards.py"
        )
    return found


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for a person."""
    tokens, low_high = facts["tokens"], facts["samples_of_a_shard"]
    few, many = (f"{number:,}" for number in low_high)
    whole, grid = facts["samples"] * facts["views"], facts["grid"]
    looked = "all" if facts["looked_at"] == whole else f"{facts['looked_at']:,} of {whole:,}"
    spread = "" if facts["looked_at"] == whole else ", evenly spread over all shards"

    def listed(pairs: Sequence[Sequence[Any]], form: Callable[[Any], str]) -> str:
        return ", ".join(f"{printable(str(name))} {form(value)}" for name, value in pairs)

    mean, deviation = (" ".join(f"{v:.3f}" for v in facts[f"colour_{name}"]) for name in ("mean", "deviation"))
    found = [
        f"{facts['where']}",
        f"  samples    {facts['samples']:,} × {facts['views']} views, {facts['rejected']:,} images rejected",
        f"  shards     {facts['shards']:,}, of {few if few == many else f'{few} to {many}'} samples, "
        f"{facts['bytes'] / 1e9:.2f} GB",
        f"  images     {facts['image_size']} px in {grid}×{grid} patches of {facts['patch_size']} px",
        f"  tokenizer  {facts['tokenizer'][:16]}..., {facts['vocabulary']:,} tokens",
        f"  digest     {facts['digest']}",
        f"looked at {looked} samples{spread}",
        f"  tokens     {tokens['used']:,} of {facts['vocabulary']:,} used, perplexity {tokens['perplexity']:,.1f} "
        f"({tokens['entropy_nats']:.2f} nats, the loss of guessing)",
        f"             {tokens['distinct_of_a_sample']:.1f} of {grid**2} in a sample are distinct",
        f"  frequent   {listed(tokens['most_frequent'], lambda share: f'{share:.1%}')}",
        f"  colours    mean {mean}, deviation {deviation}; {facts['flipped_share']:.0%} mirrored",
    ]
    for name, all_of_it in (("labels", facts["labels"]["distinct"]), ("sources", facts["sources"]["folders"])):
        most = listed(facts[name]["most_frequent"], str)
        found.append(f"  {name:<10} " + (f"{all_of_it:,}: {most}" if all_of_it else "none"))
    if facts["damaged"]:
        found.append(f"DAMAGED: {len(facts['damaged'])} samples; first {facts['damaged'][0]}. Run check_shards.py")
    return found


def _spread(manifest: Manifest, count: int) -> list[tuple[str, int]]:
    """(shard, row) of so many samples at even distances, over all views."""
    total = manifest.samples * manifest.views
    count = min(count, total)
    wanted = iter([index * total // count for index in range(count)])
    picks, first, index = [], 0, next(wanted, None)
    for shard in manifest.shards:
        while index is not None and index < first + shard.samples:
            picks.append((shard.name, index - first))
            index = next(wanted, None)
        first += shard.samples
    return picks


def _try_read(place: Place, layout: SampleLayout, shard: str, row: int) -> InspectedSample | str:
    raw = bytearray(layout.stride)
    try:
        place.read_into(shard, row * layout.stride, memoryview(raw))
        return _parse(memoryview(raw), layout)
    except StorageError:
        raise
    except (EOFError, OSError, DataError) as error:
        return f"{shard}, sample {row}: {error}"


def _parse(raw: memoryview, layout: SampleLayout) -> InspectedSample:
    text = bytes(raw[layout.json_start : layout.json_start + JSON_BYTES])
    crc, key = decode_json_start(text)
    patches = raw[layout.patches_start : layout.patches_start + layout.patches_nbytes]
    tokens = raw[layout.tokens_start : layout.tokens_start + layout.tokens_nbytes]
    got = sample_crc(key, patches, tokens)
    if got != crc:
        raise SampleError(f"crc32: got {got:08x}, expected {crc:08x}")
    parse_key(key)
    try:
        notes = dict(json.loads(text))
    except ValueError as error:
        raise SampleError(f"json: {error}") from None
    pixels = np.frombuffer(patches, np.uint8).reshape(layout.patches, layout.patch_bytes)
    grid = np.frombuffer(tokens, "<i2").astype(np.int16).reshape(layout.grid, layout.grid)
    if grid.min() < 0 or grid.max() >= layout.vocabulary:
        raise SampleError(f"tokens: got {grid.min()}..{grid.max()}, expected 0..{layout.vocabulary - 1}")
    return InspectedSample(key, unpatchify(pixels, layout.patch_size), grid, notes)


def _count(found: Inspection, sample: InspectedSample) -> None:
    found.looked_at += 1
    found.token_counts += np.bincount(sample.tokens.reshape(-1), minlength=len(found.token_counts))
    found.distinct += len(np.unique(sample.tokens))
    found.flipped += bool(sample.notes.get("flip"))
    if "label" in sample.notes:
        found.labels[str(sample.notes["label"])] += 1
    folder, slash, _ = str(sample.notes.get("source", "")).partition("/")
    found.folders[folder if slash else "(top)"] += 1
    values = sample.image.reshape(-1, 3) / 255
    found.colour_sums += np.stack([values.mean(axis=0), (values**2).mean(axis=0)])
