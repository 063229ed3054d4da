"""The shipped recipes have the original's figures, and say of each where it is from."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from beit_dist.config.model import HALF, IMAGENET_MEAN, IMAGENET_STD
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.resolve import read_ds_config, resolve
from beit_dist.engine.schedule import schedule_of
from beit_dist.models.mim import MaskedImageModel

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("beit_*.yaml"))
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

IN_1K = {"epochs": 800, "optimizer.warmup_epochs": 10, "optimizer.warmup_steps": None}
IN_1K |= {"model.pixel_mean": IMAGENET_MEAN, "model.pixel_std": IMAGENET_STD}
IN_22K = {"epochs": 150, "optimizer.warmup_epochs": None, "optimizer.warmup_steps": 10_000}
IN_22K |= {"model.pixel_mean": HALF, "model.pixel_std": HALF}
BOTH = {
    "global_batch": 2048,
    "optimizer.lr": 1.5e-3,
    "optimizer.min_lr": 1e-5,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.05,
    "model.drop_path": 0.1,
    "model.image_size": 224,
    "model.patch_size": 16,
    "model.vocabulary": 8192,
    "model.mlp_ratio": 4.0,
    "masking.min_block": 16,
}
RELEASED = {"model.relative_positions": True, "model.absolute_positions": False, "masking.masked_patches": 75}
BASE = {"model.depth": 12, "model.width": 768, "model.heads": 12, "model.layer_scale": 0.1}
LARGE = {"model.depth": 24, "model.width": 1024, "model.heads": 16, "model.layer_scale": 1e-5}
PAPER = {"model.relative_positions": False, "model.absolute_positions": True, "model.layer_scale": 0.0}
PAPER |= {"masking.mode": "paper", "masking.ratio": 0.4}
ORIGINALS: dict[str, dict[str, Any]] = {
    "beit_base": {**BOTH, **IN_1K, **RELEASED, **BASE, "optimizer.clip_grad": 3.0},
    "beit_base_22k": {**BOTH, **IN_22K, **RELEASED, **BASE, "optimizer.clip_grad": 3.0},
    "beit_base_paper": {**BOTH, **IN_1K, **BASE, **PAPER, "optimizer.clip_grad": 3.0},
    "beit_large": {**BOTH, **IN_1K, **RELEASED, **LARGE, "optimizer.clip_grad": 1.0},
    "beit_large_22k": {**BOTH, **IN_22K, **RELEASED, **LARGE, "optimizer.clip_grad": 1.0},
}
"""unilm's README and command line, the paper where they are silent."""


def named(tree: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= named(value, f"{start}{key}.") if isinstance(value, dict) else {start + key: value}
    return found


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_recipe_of_the_originals_has_its_figures(name: str) -> None:
    config = load_recipe(PretrainingConfig, path_of(name))
    got = named(config.model_dump())
    assert {setting: got[setting] for setting in ORIGINALS[name]} == ORIGINALS[name]
    rates = torch.linspace(0, 0.1, config.model.depth, dtype=torch.float64)
    assert config.model.drop_path_rates == pytest.approx(rates.tolist(), abs=1e-12)
    # Every figure is in the file, so that no default can change a recipe unseen.
    written = named(yaml.safe_load(path_of(name).read_text()))
    implied = {"model.depth", "model.width", "model.heads", "model.mlp_ratio"}
    implied |= {setting for setting, value in ORIGINALS[name].items() if value in (None, False)}
    assert ORIGINALS[name].keys() - implied <= written.keys()


def test_the_recipes_of_the_originals_make_models_of_the_published_size() -> None:
    for name, parameters in (("beit_base", 91_965_776), ("beit_large", 311_534_016)):
        with torch.device("meta"):
            model = MaskedImageModel(load_recipe(PretrainingConfig, path_of(name)).model)
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_warm_up_is_the_originals_on_its_data_sets() -> None:
    images = 1_281_167
    for name, steps in (("beit_base", 6255), ("beit_large", 6255), ("beit_base_22k", 10_000)):
        schedule = schedule_of(load_recipe(PretrainingConfig, path_of(name)), images, 2048)
        assert int(schedule.warmup) == steps


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_says_where_it_is_from(path: Path) -> None:
    source = (
        r"README|CLI|paper|masking_generator\.py|\blog\b|the same|ours" if path.stem in ORIGINALS else r"\w{3,}"
    )
    lines = path.read_text().splitlines()
    settings = [line for line in lines if not re.match(r"#|run: |\w+:$", line)]
    assert len(settings) >= 15
    assert [line for line in settings if not re.search(rf" # .*({source})", line)] == []


def missing_of_header(text: str) -> list[str]:
    """What a recipe's first lines do not tell a reader who looks for one."""
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    wanted = {
        "For": r"\w{3,}",
        "Images": r"\d|millions",
        "Time": r"\b(measured|computed from [\d,]+ images/s)\b",  # never a guess
    }
    return [name for name, said in wanted.items() if not re.search(rf"^# {name}: .*{said}", header, re.MULTILINE)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_for_whom_it_is_and_how_many_images_and_how_long_it_takes(path: Path) -> None:
    assert missing_of_header(path.read_text()) == []


def test_a_recipe_that_guesses_its_time_or_says_it_further_down_is_found() -> None:
    good = "# For: trying.\n# Images: 100.\n# Time: measured: 3 s on one core.\nrun: r\n"
    assert missing_of_header(good) == []
    assert missing_of_header(good.replace("measured: 3 s", "about 3 s")) == ["Time"]
    assert missing_of_header("run: r\n" + good) == ["For", "Images", "Time"]


@pytest.mark.parametrize("ranks", [1, 8, 16, 64])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_is_told_the_batch_of_the_page_on_1_to_64_ranks(path: Path, ranks: int) -> None:
    config = load_recipe(PretrainingConfig, path)
    page = (ROOT / "docs/recipes.md").read_text()
    row = re.search(rf"^\| {path.stem.split('_')[1]} \| (\d+) \|((?: \d+ × \d+ \|){{4}})$", page, re.MULTILINE)
    assert row is not None
    cells = re.findall(r"(\d+) × (\d+)", row[2])
    micro, accumulation = map(int, cells[(1, 8, 16, 64).index(ranks)])
    told = resolve(config, read_ds_config(ROOT / "configs/deepspeed/zero1.json"), ranks).deepspeed
    assert told["train_batch_size"] == int(row[1]) == config.global_batch
    assert told["train_micro_batch_size_per_gpu"] == micro
    assert told["gradient_accumulation_steps"] == accumulation
    assert ranks * micro * accumulation == config.global_batch
