"""--dry-run says everything that can be known before a start, for every shipped recipe, and starts nothing."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config import TrainConfig, load_recipe
from beit_dist.engine.dry_run import describe, state_bytes
from beit_dist.engine.resolve import Resolved, read_ds_config, resolve
from beit_dist.errors import DataError
from beit_dist.storage.opening import open_place
from beit_dist.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted([*CONFIGS.glob("beit_*.yaml"), CONFIGS / "demo.yaml"])
STAGES = sorted((CONFIGS / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("ds_config", STAGES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_resolved_without_data(
    recipe: Path, ds_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--ds_config", str(ds_config), "--config", str(recipe), f"run={run}", "data=null"]
    assert main([*arguments, "--dry-run", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    for subject in ("parameters", "FLOPs", "batch", "memory", "checkpoint", "lanes"):
        assert f"\n{subject}" in printed
    assert "the shard plan, the steps and the schedule are skipped" in printed
    assert not run.exists()


@pytest.mark.parametrize(
    ("recipe", "parameters", "flops"),
    # 6 × (backbone: 17.56 and 61.55 G multiply-adds; head: 75 · width · 8192)
    [("beit_base", "91,965,776", "108.2"), ("beit_large", "311,534,016", "373.1")],
)
def test_published_sizes(recipe: str, parameters: str, flops: str) -> None:
    config = load_recipe(TrainConfig, CONFIGS / f"{recipe}.yaml")
    text = describe(config, resolve(config, read_ds_config(CONFIGS / "deepspeed" / "zero1.json"), 16), None)
    assert f"parameters  {parameters}" in text
    assert f"FLOPs       {flops}" in text
    assert "75 of 196 patches" in text


def test_with_data_the_shard_plan_and_the_steps_are_told(
    small_data: Path, new_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run("run")
    assert main([*run.command()[2:], "--dry-run", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "147 samples in 3 shards" in printed
    assert "2 views" in printed
    assert "46 for 5.0068 epochs" in printed
    assert "16 = 2 ranks × 4 micro-batch × 2 accumulation" in printed
    assert "/dev/shm" in printed
    assert not run.folder.exists()


def test_held_out_data_is_looked_at_as_at_a_start(new_run: Callable[..., Any], tmp_path: Path) -> None:
    run = new_run("run", overrides=[f"validation.data={tmp_path}/nothing"])
    with pytest.raises(DataError, match=r"nothing/manifest\.json: not found"):
        main([*run.command()[2:], "--dry-run"])


def test_data_at_a_url_needs_memory_that_is_told(
    small_data: Path, new_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{uuid.uuid4()}/shards"
    for path in small_data.rglob("*.*"):
        open_place(url).write(str(path.relative_to(small_data)), path.read_bytes())
    run = new_run("run", overrides=[f"data={url}", "loader.memory_gib=0.0001"])
    command = [word for word in run.command()[2:] if not word.startswith("data=/")]
    assert main([*command, "--dry-run", "--ranks", "2"]) == 0
    # 2 of 4 lanes, 2 blocks of 2 samples of 6,144 bytes each
    assert "48.0 KiB a rank for two windows of 2 lanes, of 0.0001 GiB allowed: blocks are fetched" in (
        printed := capsys.readouterr().out
    )
    assert f"{url}: 147 samples in 3 shards" in printed
    assert main([*command, "loader.memory_gib=0.00001", "--dry-run", "--ranks", "2"]) == 0
    assert "too much, so single samples are fetched" in capsys.readouterr().out


def test_memory_follows_stage_and_precision() -> None:
    def of(stage: int, precision: str, accumulation: str, ranks: int = 4) -> int:
        resolved = Resolved(ranks, 1, 1, stage, precision, accumulation, {})
        return sum(state_bytes(resolved, 1000).values()) // 1000

    assert of(0, "fp32", "fp32") == 16  # weights, gradients, two moments
    assert of(0, "bf16", "bf16") == 16
    assert of(1, "fp32", "fp32") == 4 + 4 + 3
    assert of(1, "bf16", "bf16") == 2 + 2 + 3
    assert of(1, "bf16", "fp32") == 2 + 6 + 3  # BF16_Optimizer holds both sums
    assert of(2, "bf16", "bf16") == 2 + 0 + 3  # half a byte each
    assert of(3, "bf16", "fp32", ranks=1) == 2 + 4 + 12
