"""What a job says of itself: at its start what it reads and writes, at its end where that is and what is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.recipes import named
from beit_dist.engine.durations import counted
from beit_dist.images.decoding import CROP_AREA
from beit_dist.shards.manifest import HELD_OUT_NAME, Manifest, load_held_out
from beit_dist.shards.sample import SampleLayout
from beit_dist.shards.statistics import lines, load_statistics
from beit_dist.storage.place import Place
from beit_dist.tokenizing.finish import read_rejected
from beit_dist.tokenizing.job import Job
from beit_dist.tokenizing.parts import held_out_job
from beit_dist.tokenizing.rejected import summary

_FEW, _SOME, _LARGE = 20_000, 200_000, "beit_base"
"""Images up to which the recipes for small data, and a small model, are proposed; beyond, the other."""

Rows = list[tuple[str, str]]
"""Subjects, and what there is to say of each."""


@dataclass(frozen=True)
class Planned:
    """A job in numbers.

    Args:
        images: the sources, as the user named them.
        tokenizer: its file, likewise.
        entries: images of the list.
        held_out: so many of them are not trained on.
    """

    out: Place
    job: Job
    images: Sequence[str]
    tokenizer: str
    entries: int
    held_out: int

    @property
    def trained_on(self) -> int:
        """Images to train on."""
        return self.entries - self.held_out

    @property
    def bytes(self) -> int:
        """Of all shards, if no image is rejected."""
        return _bytes(self.job, self.trained_on) + _bytes(held_out_job(self.job), self.held_out)

    def rows(self) -> Rows:
        """What is read, what is written where, and what makes the tokens."""
        job, split = self.job, f", {self.held_out:,} of them held out" if self.held_out else ", none held out"
        rows = [
            ("images", f"{self.entries:,} in {' '.join(self.images)}{split}"),
            ("writes", f"{self.out}: {_part(job, self.trained_on)}"),
        ]
        if self.held_out:
            part = _part(held_out_job(job), self.held_out)
            rows.append(("held out", f"{self.out / HELD_OUT_NAME}: {part}"))
        rows.append(
            (
                "tokenizer",
                f"{self.tokenizer}, {job.vocabulary:,} tokens, on {job.device} in {job.precision}"
                f"{', compiled' if job.compiled else ''}",
            )
        )
        if job.pixel_version != 1 or job.decoder != "pillow":
            rows.append(("pixels", f"version {job.pixel_version}, JPEGs decoded by {job.decoder}"))
        if job.augment == "random" and job.crop_area != CROP_AREA[0]:
            rows.append(("crops", f"of {job.crop_area:.0%} to 100% of an image's area"))
        return rows


def aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """One subject a line."""
    return [f"{name:<9}  {text}" for name, text in rows]


def size(number: int) -> str:
    """Bytes in words."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def last_lines(out: Place, manifest: Manifest) -> list[str]:
    """What a finished job has made and left out, what its tokens are like, and the command that trains on it."""
    total, held_out = sum(shard.bytes for shard in manifest.shards), load_held_out(out)
    said = [
        f"{out}: {manifest.samples:,} samples × {manifest.views} views in {len(manifest.shards):,} shards "
        f"({size(total)}), {manifest.rejected} images rejected, digest {manifest.digest}"
    ]
    if held_out is not None:
        said.append(
            f"{out / HELD_OUT_NAME}: {held_out.samples:,} held-out samples, on which runs are measured, "
            f"{held_out.rejected} images rejected, digest {held_out.digest}"
        )
    statistics = load_statistics(out, manifest)
    if statistics is None:
        said.append(
            f"its tokens are not counted, so runs show no baselines. To count them: beit inspect {_quoted(out)}"
        )
    else:
        said += lines(statistics)
        measured = load_statistics(out / HELD_OUT_NAME, held_out) if held_out is not None else None
        if measured is not None:
            said.append(
                f"baselines on the held-out images: loss {measured.cross_entropy(statistics):.2f} (frequency); "
                f"accuracy {measured.share_of(statistics.commonest_token):.2%} (commonest token)"
            )
    rejected = read_rejected(out) + (read_rejected(out / HELD_OUT_NAME) if held_out is not None else [])
    return [*said, *summary(rejected), f"next: {next_command(str(out), manifest.layout, manifest.samples)}"]


def next_command(out: str, layout: SampleLayout, samples: int) -> str:
    """A command that trains on a data set: a recipe for so many images, and what its shards need changed in it."""
    recipe = next((name for most, name in ((_FEW, "small_data"), (_SOME, "beit_small")) if samples < most), _LARGE)
    model = load_recipe(PretrainingConfig, named("pretraining", recipe)).model
    sizes = {"image_size": layout.image_size, "patch_size": layout.patch_size, "vocabulary": layout.vocabulary}
    changes = [f"model.{name}={value}" for name, value in sizes.items() if getattr(model, name) != value]
    return shlex.join(["beit", "train", "--config", recipe, "--data", out, "--run", "runs/first", *changes])


def _quoted(out: Place) -> str:
    return shlex.quote(str(out))


def _part(job: Job, images: int) -> str:
    shards, views = counted(job.views * -(-images // job.shard_samples), "shard"), counted(job.views, "view")
    return f"{images:,} images × {views} in {shards}, {size(_bytes(job, images))}"


def _bytes(job: Job, images: int) -> int:
    whole, rest = divmod(images, job.shard_samples)
    one_view = whole * job.layout.shard_bytes(job.shard_samples) + (job.layout.shard_bytes(rest) if rest else 0)
    return job.views * one_view
