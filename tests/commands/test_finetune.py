"""``beit finetune``: what the command line makes of recipe, flags and the weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from beit_dist.commands import finetune
from beit_dist.commands.training import parse
from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.errors import ConfigError

ORIGIN = {"width": 48, "depth": 5, "heads": 3, "image_size": 64, "patch_size": 8, "pixel_mean": (0.4, 0.4, 0.4)}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is known of the backbone of ``init_from``; tests may change it."""
    found: dict[str, Any] = dict(ORIGIN)

    def known_backbone(given: Mapping[str, Any]) -> Mapping[str, Any]:
        return found if "init_from" in given else {}

    monkeypatch.setattr(finetune, "known_backbone", known_backbone)
    return found


def settings(*words: str) -> FinetuningConfig:
    """Of a command line."""
    return finetune.settings(parse(finetune.parser(), ["--run", "r", *words]))


def test_flags_are_the_settings_of_their_names(known: dict[str, Any], tmp_path: Path) -> None:
    config = settings("--init-from", str(tmp_path), "--data", "train", "--test", "val", "--precision", "fp32")
    assert (config.run, config.init_from, config.data, config.validation.data) == (
        "r",
        str(tmp_path),
        "train",
        "val",
    )
    assert config.precision == "fp32"
    assert settings("--test", "val", "validation.data=other").validation.data == "other"  # the later one holds


def test_what_init_from_has_fills_what_the_recipe_leaves_open(known: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {image_size: 96, drop_path: 0.3}\n")
    model = settings("--config", str(recipe), "--init-from", str(tmp_path), "model.patch_size=16").model
    assert (model.width, model.depth, model.heads, model.pixel_mean) == (48, 5, 3, (0.4, 0.4, 0.4))
    assert (model.image_size, model.drop_path, model.patch_size) == (96, 0.3, 16)
    assert model.block_positions


def test_without_init_from_the_model_is_the_recipes_own(known: dict[str, Any]) -> None:
    model = settings("model.size=tiny").model
    assert (model.width, model.depth, model.heads) == (192, 12, 3)


def test_a_size_that_does_not_fit_the_patches_of_init_from_is_refused(
    known: dict[str, Any], tmp_path: Path
) -> None:
    known["patch_size"] = 14
    with pytest.raises(
        ConfigError, match=r"model\.patch_size: got 14, expected a divisor of model\.image_size \(64\)"
    ):
        settings("--init-from", str(tmp_path))


def test_an_unknown_task_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="task: got 'detection', expected 'classification' or 'segmentation'"):
        settings("task=detection")
