"""Recipe and DeepSpeed JSON fit together or are refused; random numbers depend on seed, step and row only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.config.reading import validate
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.resolve import read_ds_config, resolve
from beit_dist.errors import ConfigError
from beit_dist.tasks.tokenizer.noise import noise_of_rows

DEEPSPEED = Path(__file__).parents[3] / "configs" / "deepspeed"


def recipe(**settings: Any) -> TokenizerConfig:
    return validate(TokenizerConfig, {"run": "r", **settings})


def test_the_batch_is_the_same_on_any_ranks_that_divide_it() -> None:
    for ranks, expected in ((1, (64, 8)), (8, (64, 1)), (64, (8, 1))):
        resolved = resolve(recipe(global_batch=512), read_ds_config(DEEPSPEED / "zero1.json"), ranks)
        assert (resolved.micro_batch, resolved.accumulation) == expected
    with pytest.raises(
        ConfigError,
        match=r"global_batch: got 512, expected a multiple of the 12 ranks. Use global_batch=504",
    ):
        resolve(recipe(global_batch=512), None, 12)


def test_weights_are_fp32_without_json_and_fp16_is_refused_for_want_of_its_scaler() -> None:
    for asked in ("auto", "bf16", "fp32"):
        assert resolve(recipe(precision=asked), None, 1).precision == "fp32"
    with pytest.raises(ConfigError, match=r"precision: got 'fp16', expected DeepSpeed's loss scaler.*zero1"):
        resolve(recipe(precision="fp16"), None, 1)
    assert resolve(recipe(precision="fp16"), read_ds_config(DEEPSPEED / "zero1.json"), 1).precision == "fp16"


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    generator = torch.Generator()
    whole = noise_of_rows(3, 7, range(6), (5, 2, 2), generator)
    assert torch.equal(noise_of_rows(3, 7, range(4, 6), (5, 2, 2), generator), whole[4:])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6
    for seed, step in ((4, 7), (3, 8)):
        assert not torch.equal(noise_of_rows(seed, step, range(6), (5, 2, 2), generator), whole)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image_size": 20}, "image_size"),
        ({"image_size": 64, "view_size": 32}, "image_size"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale"),
        ({"temperature": [0.1, 1.0]}, "temperature"),
        ({"optimizer": {"min_lr": 1.0}}, "min_lr"),
        ({"stepz": 1}, "steps"),
        ({"collapse": {"below": 2}}, r"collapse\.below"),
    ],
)
def test_contradictory_recipes_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        recipe(**changes)
