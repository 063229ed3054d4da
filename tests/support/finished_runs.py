"""Whole runs of a few steps, with real checkpoints and measurements: for tests that use what a run has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from support.classes import write_classes
from support.runs import ROOT, Run

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import Manifest
from beit_dist.weights.tokenizer_files import save_tokenizer

SIDE, PATCH, WIDTH, DEPTH, VOCABULARY = 32, 8, 32, 3, 64
SIZES = f"width: {WIDTH}, depth: {DEPTH}, heads: 2, image_size: {SIDE}, patch_size: {PATCH}"
COMMON = """\
precision: fp32
steps: 4
optimizer: {lr: 1e-2, warmup_steps: 0}
checkpoint: {every_minutes: null}
logging: {every_steps: 1, metrics_port: null}
"""
PRETRAINING = f"""\
{COMMON}model: {{{SIZES}, vocabulary: {VOCABULARY}, layer_scale: 0.5}}
masking: {{min_block: 4}}
global_batch: 8
micro_batch: 8
loader: {{workers: 0}}
"""
FINETUNING = f"""\
{COMMON}global_batch: 8
micro_batch: 8
layer_decay: 1.0
loader: {{workers: 1, timeout_seconds: 120}}
validation: {{every_steps: 4}}
"""
CLASSIFICATION = f"""\
{FINETUNING}head_scale: 1.0
augmentation: {{crop_share: 0.75, interpolation: bilinear, rand_augment: null}}
mixing: {{mixup: 0, cutmix: 0}}
ema: {{decay: 0.5}}
"""
SEGMENTATION = f"""\
{FINETUNING}task: segmentation
views: {{base_size: 40}}
segmentation: {{flip: true, scales: [1.0, 1.5]}}
maps: {{ids: [0, 2], ignore_label: 9}}
"""


def pretrained(folder: Path, make_shards: Any, **settings: str) -> Path:
    """A pre-training run, ``folder/pretrained``, with its tokenizer beside its shards in ``folder/shards``."""
    config = DVAEConfig(vocabulary=VOCABULARY, hidden=8, blocks_per_group=1, decoder_input=8)
    made = make_shards(folder / "shards")
    digest = save_tokenizer(folder / "shards" / "tokenizer.safetensors", DVAE(config), config)
    named = Manifest(made.layout, digest, made.views, made.write_seed, 0, made.shards)
    (folder / "shards" / "manifest.json").write_bytes(named.to_bytes())
    return _finished(
        folder, "pretrained", PRETRAINING, folder / "shards", ROOT / "beit_dist" / "train.py", settings
    )


def classifier(folder: Path, init_from: Path) -> Path:
    """A run of classification, ``folder/classes``; images of classes in ``folder/train`` and ``folder/test``."""
    write_classes(folder / "train", side=40)
    write_classes(folder / "test", (9, 8, 7), side=40, seed=1)
    settings = {"validation.data": str(folder / "test"), "init_from": str(init_from)}
    entry = ROOT / "beit_dist" / "finetune.py"
    return _finished(folder, "classes", CLASSIFICATION, folder / "train", entry, settings)


def segmenter(folder: Path, init_from: Path) -> Path:
    """A run of segmentation, ``folder/segments``, with ``folder/images`` and ``folder/labels``."""
    for part, count in (("train", 10), ("test", 4)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(count):
            _scene(np.random.default_rng((number, count)), folder, f"{part}/{number}.png")
    (folder / "classes.txt").write_text("red\ngreen\nblue\n")
    settings = {"validation.data": str(folder / "images" / "test"), "init_from": str(init_from)}
    entry = ROOT / "beit_dist" / "finetune.py"
    return _finished(folder, "segments", SEGMENTATION, folder / "images" / "train", entry, settings)


def measured(run: Path) -> dict[str, Any]:
    """The last line of its validation.jsonl."""
    found: dict[str, Any] = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    return found


def _finished(folder: Path, name: str, text: str, data: Path, entry: Path, settings: dict[str, str]) -> Path:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(text)
    overrides = [f"{setting}={value}" for setting, value in settings.items()]
    run = Run(folder / name, data, recipe, ROOT / "configs/deepspeed/zero0.json", overrides=overrides, entry=entry)
    code, output = run.finish()
    assert code == 0, output
    return run.folder


def _scene(random: np.random.Generator, folder: Path, name: str) -> None:
    """Two halves of a colour each, of a size of its own, and the map of them."""
    height, width = random.integers(30, 70, 2)
    labels = np.full((height, width), random.integers(3), np.uint8)
    labels[:, width // 2 :] = random.integers(3)
    pixels = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
    pixels[np.arange(height)[:, None], np.arange(width), labels] += 110
    labels[0] = 9
    Image.fromarray(pixels).save(folder / "images" / name)
    Image.fromarray(labels).save(folder / "labels" / name)
