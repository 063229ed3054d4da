"""Recipe and DeepSpeed JSON fit together or are refused; random numbers depend on seed, step and row only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.engine.resolve import read_ds_config
from beit_dist.engine.tokenizer.build import choose_arithmetic, resolve
from beit_dist.engine.tokenizer.draws import noise_of_rows
from beit_dist.errors import ConfigError
from beit_dist.settings import validate
from beit_dist.tokenizer_config import TokenizerRecipe

DEEPSPEED = Path(__file__).parents[3] / "configs" / "deepspeed"


def recipe(**settings: Any) -> TokenizerRecipe:
    return validate(TokenizerRecipe, settings)


def test_the_batch_is_the_same_on_any_ranks_that_divide_it() -> None:
    for ranks, expected in ((1, (64, 8)), (8, (64, 1)), (64, (8, 1))):
        resolved = resolve(recipe(batch=512), read_ds_config(DEEPSPEED / "zero1.json"), ranks)
        assert (resolved.micro_batch, resolved.accumulation) == expected
    with pytest.raises(
        ConfigError, match=r"batch: got 512, expected a multiple of the 12 ranks. Use batch=504 or 516"
    ):
        resolve(recipe(batch=512), None, 12)


def test_precision_is_that_of_the_json_and_a_conflict_is_refused() -> None:
    low, cpu = read_ds_config(DEEPSPEED / "zero1.json"), torch.device("cpu")
    assert choose_arithmetic(recipe(), resolve(recipe(), low, 1), False, cpu) == "bf16"
    plain = read_ds_config(DEEPSPEED / "zero0.json")
    assert choose_arithmetic(recipe(), resolve(recipe(), plain, 1), False, torch.device("cuda")) == "fp32"
    with pytest.raises(ConfigError, match="precision: got 'fp32', expected bf16 as --ds_config has it, or auto"):
        resolve(recipe(precision="fp32"), low, 1)


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", "avx2", "bf16"),
        ("cpu", "avx512_bf16 amx_bf16 amx_tile", "bf16"),
        ("cpu", "avx512_bf16", "fp32"),
        ("cpu", None, "fp32"),
    ],
)
def test_without_json_precision_is_bf16_only_where_that_is_fast(
    tmp_path: Path, device: str, flags: str | None, expected: str
) -> None:
    processor = tmp_path / "cpuinfo"
    if flags is not None:
        processor.write_text(f"flags\t: fpu {flags}\n")
    for asked, got in (("auto", expected), ("bf16", "bf16"), ("fp32", "fp32")):
        chosen = recipe(precision=asked)
        resolved = resolve(chosen, None, 1)
        assert resolved.precision == "fp32", "of the weights"
        assert choose_arithmetic(chosen, resolved, True, torch.device(device), processor) == got


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
        ({"min_lr": 1.0}, "min_lr"),
        ({"stepz": 1}, "steps"),
        ({"collapse": {"below": 2}}, r"collapse\.below"),
    ],
)
def test_contradictory_recipes_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        recipe(**changes)
