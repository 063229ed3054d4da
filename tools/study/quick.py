"""A trial of each kind, a few steps on generated images: a smoke of the whole chain, which learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from study.trials import Trial

NAMES = (
    *("tokenizer/good", "shards/good-8", "pretrain/random/0", "probe/random/0"),
    *("pretrain/tokens-blocks/0", "probe/tokens-blocks/0", "pretrain/pixels-blocks/0", "pretrain/tokens-random/0"),
    *("finetune/tokens-blocks/10/0-0", "finetune/scratch/10/0"),
    *("tokenizer/camvid", "shards/camvid", "pretrain/camvid/0", "segment/pretrained/0-0", "segment/scratch/0"),
)
_SMALL = ("model.width=32", "model.depth=2", "model.heads=2")
_BATCH = ("global_batch=4", "micro_batch=4")
_TOKENIZER = (
    *("steps=3", "model.vocabulary=16", "model.hidden=4", "model.decoder_input=8", "held_out=4"),
    *("view_size=32", "image_size=32", "collapse.below=null", *_BATCH),
)
_SETTINGS = {
    "tokenizer": _TOKENIZER,
    "train": (*_SMALL, *_BATCH, "model.vocabulary=16", "masking.min_block=2", "epochs=0.2"),
    "finetune": (*_SMALL, *_BATCH, "epochs=1"),
}
_CAMVID = {
    "shards": ("--image-size", "32", "--patch-size", "8"),
    "train": ("model.image_size=32",),
    "finetune": ("model.image_size=32", "views.base_size=32"),
}
_CIFAR = {"shards": ("--image-size", "16")}
"""So that the tokenizer's views of 8 px for each patch have 32 px, too."""
_CIFAR_SIZE = {"train": ("model.image_size=16",), "finetune": ("model.image_size=16",)}


def quick(trials: Sequence[Trial]) -> list[Trial]:
    """Those of :data:`NAMES`, made small."""
    return [_small(trial) for trial in trials if trial.name in NAMES]


def _small(trial: Trial) -> Trial:
    command = trial.words[0]
    street = "camvid" in trial.name or (command == "finetune" and trial.name.startswith("segment"))
    sizes = _CAMVID if street else {**_CIFAR, **_CIFAR_SIZE}
    views = ("--views", "1") if command == "shards" else ()
    words = (*trial.words, *views, *_SETTINGS.get(command, ()), *sizes.get(command, ()))
    return replace(trial, words=words)


def write_data(folder: Path, seed: int = 0) -> None:
    """Images of three classes, and street scenes with label maps, all of noise around a colour; once."""
    if (folder / "photos").exists():
        return
    random = np.random.default_rng(seed)
    for part, count in (("train", 20), ("val", 6)):
        for number, name in enumerate(("amber", "blue", "green")):
            for image in range(count):
                _write(folder / "cifar10" / part / name / f"{image}.png", random, 60 + 60 * number, (32, 32))
        for image in range(count // 2):
            _write(folder / "camvid" / "images" / part / f"{image}.png", random, 120, (48, 40))
            labels = random.integers(0, 12, (5, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            path = folder / "camvid" / "labels" / part / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    for image in range(6):
        _write(folder / "photos" / f"{image}.png", random, 150, (48, 40))


def _write(path: Path, random: np.random.Generator, mean: float, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.normal(mean, 40, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
