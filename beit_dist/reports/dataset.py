"""What a data set holds, from a bounded number of its samples: counts, tokens, labels, and a sheet of pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from beit_dist.errors import DataError, StorageError, printable
from beit_dist.models.verdict import Drawn, TokenUse, Verdict, judge
from beit_dist.reports.samples import Pixels, ShardSample, located, read_sample, spread
from beit_dist.shards.manifest import HELD_OUT_NAME, Manifest, load_held_out
from beit_dist.shards.statistics import Statistics, Tally, keep_statistics, load_statistics
from beit_dist.storage.place import Place

VIEWS_SHOWN = 4
"""Most views of an image that are looked at, where not all samples are."""
_READ_AT_ONCE = 16
SAMPLES = 1000
"""Looked at where nothing else is said."""
_COUNTED_WHOLE = 1_000_000_000
"""Bytes of a data set without statistics that are all read to count its tokens: seconds."""
_MOST = 10
"""Entries of a list of the most frequent."""


@dataclass
class Inspection:
    """A data set's manifest, and what was found in the samples that were looked at."""

    manifest: Manifest
    where: str
    statistics: Statistics
    """Of the samples that were looked at, or those beside the manifest where they are of more."""
    held_out: Manifest | None = None
    looked_at: int = 0
    damaged: list[str] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    """First folder of the sources' names."""
    flipped: int = 0
    sheet: list[ShardSample] = field(default_factory=list)
    """Some of the samples, for pictures; the views of an image follow one another."""
    redrawn: list[Pixels] = field(default_factory=list)
    """What the tokenizer makes of the tokens of each sample of :attr:`sheet`, of any size."""

    @property
    def images(self) -> list[list[ShardSample]]:
        """The samples of :attr:`sheet`, those of an image together."""
        return [list(views) for _, views in groupby(self.sheet, lambda sample: sample.sample_id)]

    @property
    def drawn(self) -> Drawn | None:
        """How near :attr:`redrawn` come, beside single colours of the same images; None if nothing is redrawn."""
        if not self.redrawn:
            return None
        import torch  # here: without a tokenizer nothing needs it

        from beit_dist.models.palette import single_colours

        pairs = zip(self.sheet, self.redrawn, strict=True)
        images = torch.from_numpy(np.stack([_as_large(sample.image, pixels) for sample, pixels in pairs]))
        images = images.permute(0, 3, 1, 2)
        return Drawn(self.psnr, single_colours(images, images, self.manifest.layout.vocabulary))

    @property
    def psnr(self) -> float:
        """Of all of :attr:`redrawn`, in dB."""
        errors = [error_of(sample.image, pixels) for sample, pixels in zip(self.sheet, self.redrawn, strict=True)]
        return decibels(float(np.mean(errors)))

    def keep_statistics(self, place: Place) -> list[str]:
        """Write the statistics where the data set has none, or take those it has, if they are of more samples.

        Returns:
            What was written, or why not, for a person. Counts that lack damaged samples are never written.
        """
        if self.damaged:
            return []
        self.statistics, said = keep_statistics(place, self.manifest, self.statistics)
        return [said] if said else []

    def facts(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON takes it."""
        manifest, layout, count = self.manifest, self.manifest.layout, max(1, self.looked_at)
        statistics, tally = self.statistics, self.statistics.tally
        most = np.argsort(-tally.tokens, kind="stable")[:_MOST]
        sizes = [shard.samples for shard in manifest.view_shards(0)]
        return {
            "where": self.where,
            "digest": manifest.digest,
            "samples": manifest.samples,
            "views": manifest.views,
            "rejected": manifest.rejected,
            "held_out": self.held_out.samples if self.held_out else 0,
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
                "samples": tally.samples,
                "seen": int(tally.tokens.sum()),
                "used": statistics.used,
                "perplexity": statistics.perplexity,
                "entropy_nats": statistics.entropy,
                "uniform_nats": math.log(layout.vocabulary),
                "commonest_share": statistics.commonest_share,
                "image_entropy_nats": statistics.image_entropy,
                "image_commonest_share": statistics.image_commonest_share,
                "distinct_of_a_sample": int(tally.repeated.sum()) / max(1, tally.samples),
                "most_frequent": [[int(t), statistics.share_of(t)] for t in most if tally.tokens[t]],
            },
            "redrawn": {"samples": len(self.redrawn), "psnr": self.psnr} if self.redrawn else None,
            "verdict": judge(TokenUse.of(tally.tokens), self.drawn)._asdict(),
            "labels": {"distinct": len(self.labels), "most_frequent": self.labels.most_common(_MOST)},
            "sources": {"folders": len(self.folders), "most_frequent": self.folders.most_common(_MOST)},
            "flipped_share": self.flipped / count,
            "colour_mean": [round(value, 4) for value in statistics.pixel_mean],
            "colour_deviation": [round(value, 4) for value in statistics.pixel_deviation],
        }


def samples_to_look_at(place: Place, manifest: Manifest) -> int:
    """By default: a bounded number, or all of a small data set whose tokens are not counted yet."""
    small = sum(shard.bytes for shard in manifest.shards) <= _COUNTED_WHOLE
    return manifest.samples * manifest.views if small and load_statistics(place, manifest) is None else SAMPLES


def inspect(
    place: Place, manifest: Manifest, samples: int, pictures: int, progress: Callable[[], object] = lambda: None
) -> Inspection:
    """Look at up to ``samples`` samples of images spread evenly over all shards, and keep some for pictures.

    Of each image several views are looked at, to be shown side by side. Damaged samples are listed and left out.

    Raises:
        StorageError: the store does not answer, or refuses.
        DataError: no sample could be read.
    """
    tally = Tally.empty(manifest.layout)
    found = Inspection(manifest, str(place), Statistics(tally, whole=False), load_held_out(place))
    picks, shown = picked(manifest, samples), min(VIEWS_SHOWN, manifest.views)
    images = list(dict.fromkeys(image for image, _ in picks))
    kept = {images[number]: shown for number in spread(len(images), -(-pictures // shown))}
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        read = pool.map(lambda pick: _try_read(place, manifest, *pick), picks)
        for (image, _), sample in zip(picks, read, strict=True):
            progress()
            if isinstance(sample, str):
                found.damaged.append(sample)
                continue
            tally.add(sample.tokens, sample.patches)
            _count(found, sample)
            if kept.get(image):
                kept[image] -= 1
                found.sheet.append(sample)
    if not found.looked_at:
        raise DataError(f"{place}: none of {len(picks)} samples can be read: {found.damaged[0]}. Run beit check")
    found.statistics = Statistics(tally, whole=tally.samples == manifest.samples * manifest.views)
    return found


def error_of(image: Pixels, redrawn: Pixels) -> float:
    """Mean squared error of values in [0, 1], at the size at which it was redrawn."""
    return float(((_as_large(image, redrawn).astype(np.float64) - redrawn) ** 2).mean() / 255**2)


def _as_large(image: Pixels, redrawn: Pixels) -> Pixels:
    if image.shape != redrawn.shape:
        size = (redrawn.shape[1], redrawn.shape[0])
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return image


def decibels(error: float) -> float:
    """The PSNR of a mean squared error of values in [0, 1]."""
    return -10 * math.log10(max(error, 1e-10))


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for a person."""
    tokens, low_high = facts["tokens"], facts["samples_of_a_shard"]
    few, many = (f"{number:,}" for number in low_high)
    whole, grid = facts["samples"] * facts["views"], facts["grid"]
    looked = "all" if facts["looked_at"] == whole else f"{facts['looked_at']:,} of {whole:,}"
    spread = "" if facts["looked_at"] == whole else ", evenly spread over all shards"

    def listed(pairs: Sequence[Sequence[Any]], form: Callable[[Any], str]) -> str:
        return ", ".join(f"{printable(str(name))} {form(value)}" for name, value in pairs)

    counted = "all" if tokens["samples"] == whole else f"{tokens['samples']:,}"
    mean, deviation = (" ".join(f"{v:.3f}" for v in facts[f"colour_{name}"]) for name in ("mean", "deviation"))
    found = [
        f"{facts['where']}",
        f"  samples    {facts['samples']:,} × {facts['views']} views, {facts['rejected']:,} images rejected",
        *(
            [f"  held out   {facts['held_out']:,} samples in {facts['where']}/{HELD_OUT_NAME}"]
            if facts["held_out"]
            else []
        ),
        f"  shards     {facts['shards']:,}, of {few if few == many else f'{few} to {many}'} samples, "
        f"{facts['bytes'] / 1e9:.2f} GB",
        f"  images     {facts['image_size']} px in {grid}×{grid} patches of {facts['patch_size']} px",
        f"  tokenizer  {facts['tokenizer'][:16]}..., {facts['vocabulary']:,} tokens",
        f"  digest     {facts['digest']}",
        f"looked at {looked} samples{spread}",
        f"  tokens     {tokens['used']:,} of {facts['vocabulary']:,} in use, "
        f"perplexity {tokens['perplexity']:,.1f}, in {counted} samples",
        f"             {tokens['distinct_of_a_sample']:.1f} of {grid**2} in a sample are distinct",
        f"  baselines  loss {tokens['uniform_nats']:.2f} (uniform), {tokens['entropy_nats']:.2f} (frequency); "
        f"accuracy {tokens['commonest_share']:.2%} (commonest token)",
        f"             within an image: {tokens['image_entropy_nats']:.2f} nats, "
        f"{tokens['image_commonest_share']:.2%}",
        f"  frequent   {listed(tokens['most_frequent'], lambda share: f'{share:.1%}')}",
        f"  colours    mean {mean}, deviation {deviation}; {facts['flipped_share']:.0%} mirrored",
    ]
    if redrawn := facts["redrawn"]:
        found.append(
            f"  redrawn    PSNR {redrawn['psnr']:.2f} dB, {redrawn['samples']:,} samples drawn from their tokens"
        )
    for name, all_of_it in (("labels", facts["labels"]["distinct"]), ("sources", facts["sources"]["folders"])):
        most = listed(facts[name]["most_frequent"], str)
        found.append(f"  {name:<10} " + (f"{all_of_it:,}: {most}" if all_of_it else "none"))
    found.append(f"verdict on the tokenizer: {Verdict(**facts['verdict'])}")
    if facts["damaged"]:
        found.append(
            f"DAMAGED: {len(facts['damaged'])} samples, the first is {facts['damaged'][0]}. Run beit check"
        )
    return found


def picked(manifest: Manifest, samples: int) -> list[tuple[int, int]]:
    """(image, view) of up to ``samples`` samples: all, or several views of images at even distances.

    Where an image has more views than are looked at, it is now these and now those.
    """
    views = manifest.views
    if samples >= manifest.samples * views:
        return [(image, view) for image in range(manifest.samples) for view in range(views)]
    some = min(VIEWS_SHOWN, views)
    images = spread(manifest.samples, -(-samples // some))
    picks = [
        (image, view)
        for number, image in enumerate(images)
        for view in sorted((number * some + place) % views for place in range(some))
    ]
    return picks[:samples]


def _try_read(place: Place, manifest: Manifest, image: int, view: int) -> ShardSample | str:
    number, row = located(manifest, image)
    shard = manifest.view_shards(view)[number].name
    try:
        return read_sample(place, manifest.layout, shard, row)
    except StorageError:
        raise
    except (EOFError, OSError, DataError) as error:
        return f"{shard}, sample {row}: {error}"


def _count(found: Inspection, sample: ShardSample) -> None:
    found.looked_at += 1
    found.flipped += bool(sample.notes.get("flip"))
    if "label" in sample.notes:
        found.labels[str(sample.notes["label"])] += 1
    folder, slash, _ = str(sample.notes.get("source", "")).partition("/")
    found.folders[folder if slash else "(top)"] += 1
