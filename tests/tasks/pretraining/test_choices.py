"""What a recipe names in tables: wrong names are refused before anything starts, and idle settings are said."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.dry_run import describe
from beit_dist.engine.resolve import resolve
from beit_dist.errors import ConfigError
from beit_dist.models.heads.targets import HEADS
from beit_dist.shards.manifest import Manifest
from beit_dist.stream.masking.modes import MODES
from beit_dist.tasks.pretraining.choices import unused_settings
from beit_dist.tasks.pretraining.dataset import open_data
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.train import main

ROOT = Path(__file__).parents[3]
RECIPES = sorted([*(ROOT / "configs").glob("beit_*.yaml"), ROOT / "configs" / "demo.yaml"])
BASE = ROOT / "configs" / "beit_base.yaml"


def told(*overrides: str) -> str:
    """What --dry-run prints of the base recipe."""
    config = load_recipe(PretrainingConfig, BASE, overrides)
    return describe(Pretraining(config), resolve(config, {}, 1))


@pytest.mark.parametrize(
    "setting", [*(f"masking.mode={mode}" for mode in MODES), *(f"model.target={target}" for target in HEADS)]
)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_one_key_switches_any_recipe_to_any_mode_and_target(recipe: Path, setting: str, tmp_path: Path) -> None:
    config = load_recipe(PretrainingConfig, recipe, [setting, "data=null", f"run={tmp_path}"])
    assert f"\n{'masking':<10}  {config.masking.mode}: " in describe(Pretraining(config), resolve(config, {}, 2))


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """A step without the start that took it, when, and how fast."""
    of_the_start = ("attempt", "time", "images_per_second", "data_wait", "peak_memory")
    return {k: value for k, value in line.items() if k not in of_the_start}


@pytest.mark.slow
def test_pixels_under_random_masks_at_stage_3_on_two_ranks_killed_and_resumed(
    new_run: Callable[..., Any], tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    make_shards(tmp_path / "held-out", [20], seed=3)
    ds = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": {"enabled": False}}
    settings = ["model.target=pixels", "masking.mode=random", "loader.workers=0", "steps=12"]
    held_out = [f"validation.data={tmp_path / 'held-out'}", "validation.every_steps=6"]
    run, cut = (new_run(name, ds, ranks=2, overrides=[*settings, *held_out]) for name in ("run", "cut"))
    code, output = run.finish()
    assert code == 0, output
    cut.signal_at(8, signal.SIGKILL, rank=None)
    code, output = cut.finish()
    assert code == 0, output
    assert [comparable(line) for line in cut.lines()] == [comparable(line) for line in run.lines()]
    assert cut.final_files() == run.final_files()
    lines = run.lines()
    assert {line["masked"] for line in lines} == {16 * 7}
    assert all("accuracy" not in line and line["loss"] > 0 for line in lines)
    results = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert [(r["step"], r["masked"], "accuracy" in r) for r in results] == [(6, 140, False), (12, 140, False)]
    assert "accuracy" not in output


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("masking.mode=rnadom", r"masking\.mode: got 'rnadom', expected one of .*Did you mean random\?"),
        ("model.target=token", r"model\.target: got 'token', expected one of .*Did you mean tokens\?"),
        ("masking.min_block=90", "at most the 75 masked patches"),
        ("masking.masked_patches=196", "fewer masked patches than the 196"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_starts(override: str, said: str, tmp_path: Path) -> None:
    arguments = ["--ds_config", str(ROOT / "configs/deepspeed/zero1.json"), "--config", str(BASE), override]
    with pytest.raises(ConfigError, match=said):
        main([*arguments, f"run={tmp_path / 'run'}", f"data={tmp_path}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "unused"),
    [
        ([], []),
        (["masking.mode=random"], ["masking.min_block"]),
        (["masking.mode=paper"], ["masking.masked_patches"]),
        (["masking.ratio=0.5"], ["masking.ratio"]),  # beside masked_patches
        (["masking.masked_patches=0", "masking.ratio=0.5"], []),
        (["model.target=pixels"], ["model.vocabulary"]),
        (["model.pixels.beta=2"], ["model.pixels.beta"]),
        (["model.target=pixels", "model.pixels={loss: mse, beta: 2}"], ["model.vocabulary", "model.pixels.beta"]),
        (["model.target=pixels", "masking.mode=random"], ["model.vocabulary", "masking.min_block"]),
    ],
)
def test_settings_that_nothing_looks_at_are_listed(overrides: list[str], unused: list[str]) -> None:
    assert unused_settings(load_recipe(PretrainingConfig, BASE, overrides)) == unused
    expected = (
        f"ignored     {', '.join(unused)}, which have no effect with masking.mode=" if unused else "\nparameters"
    )
    assert expected in told(*overrides)
    assert ("ignored" in told(*overrides)) == bool(unused)


def test_the_dry_run_says_what_is_predicted() -> None:
    assert "target      tokens: which of 8192 visual tokens a masked patch is; cross-entropy\n" in told()
    painted = "target      pixels: the 768 values of a masked patch, normalised "
    assert f"{painted}by model.pixel_mean and pixel_std; smooth L1 with beta 1\n" in told("model.target=pixels")
    own = told("model.target=pixels", "model.pixels={loss: mse, normalise_patches: true}")
    assert f"{painted}each by its own mean and deviation; squared error\n" in own


def test_parameters_work_and_memory_are_those_of_the_head() -> None:
    """The head of tokens has (768 + 1) · 8192 parameters, that of pixels (768 + 1) · 768.

    Of fp32, tokens keep their logits and then the gradient of these; pixels keep predictions and twice as much.
    """
    pixels = told("model.target=pixels")
    assert f"parameters  {91_965_776 - 769 * (8192 - 768):,}\n" in pixels
    work = (17.56e9 + 75 * 768 * 768) * 6 / 1e9
    assert f"FLOPs       {work:.4g}"[:17] in pixels
    kept = []
    for target in HEADS:
        config = load_recipe(
            PretrainingConfig, BASE, ["precision=fp32", "micro_batch=1", f"model.target={target}"]
        )
        kept.append(Pretraining(config).activation_bytes(resolve(config, {}, 2048)))
    assert kept[0] - kept[1] == 75 * (8192 * 8 - 768 * 12)


def test_shards_of_another_vocabulary_do_for_pixels(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    make_shards(tmp_path, vocabulary=32)
    model = {"width": 32, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}

    def config(**more: Any) -> PretrainingConfig:
        return PretrainingConfig(run="r", data=str(tmp_path), model={**model, **more}, masking={"mode": "random"})

    with pytest.raises(ConfigError, match=r"model\.vocabulary: got 64, expected 32"):
        open_data(config(), check_files=True)
    assert open_data(config(target="pixels"), check_files=True).samples > 0
    with pytest.raises(ConfigError, match=r"model\.patch_size: got 16, expected 8"):
        open_data(config(target="pixels", patch_size=16), check_files=True)
