"""--dry-run says everything that can be known before a start, for every shipped recipe, and starts nothing."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine import refusal
from beit_dist.engine.dry_run import describe
from beit_dist.engine.memory import state_bytes
from beit_dist.engine.resolve import Resolved, read_ds_config, resolve
from beit_dist.errors import CheckpointError, ConfigError, DataError, SpaceError
from beit_dist.storage.opening import open_place
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted([*CONFIGS.glob("beit_*.yaml"), CONFIGS / "demo.yaml"])
STAGES = sorted((CONFIGS / "deepspeed").glob("*.json"))


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A disk on which so many GiB are free; 100 where a test does not say."""

    def free(gib: float) -> None:
        monkeypatch.setattr(refusal, "free_space", lambda folder: int(gib * 2**30))

    free(100)
    return free


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
    assert "its plan, the steps and the schedule are skipped" in printed
    assert not run.exists()


@pytest.mark.parametrize(
    ("recipe", "parameters", "flops"),
    # 6 × (backbone: 17.56 and 61.55 G multiply-adds; head: 75 · width · 8192)
    [("beit_base", "91,965,776", "108.2"), ("beit_large", "311,534,016", "373.1")],
)
def test_published_sizes(recipe: str, parameters: str, flops: str) -> None:
    config = load_recipe(PretrainingConfig, CONFIGS / f"{recipe}.yaml")
    resolved = resolve(config, read_ds_config(CONFIGS / "deepspeed" / "zero1.json"), 16)
    text = describe(Pretraining(config), resolved)
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
    assert "46, or 5.007 epochs" in printed
    assert "16 = 2 ranks × 2 micro-batches of 4" in printed
    assert "/dev/shm" in printed
    assert not run.folder.exists()


def test_room_for_checkpoints_is_told_and_too_little_is_refused(disk: Callable[[float], None]) -> None:
    config = load_recipe(PretrainingConfig, CONFIGS / "beit_base.yaml")
    resolved = resolve(config, read_ds_config(CONFIGS / "deepspeed" / "zero1.json"), 16)
    kept, size = config.checkpoint.keep, 1.0277
    said = f"{kept} are kept while one is written: {(kept + 1) * size:.2f} GiB needed, 100.00 GiB free"
    assert f"checkpoint  {size:.2f} GiB; {said}\n" in describe(Pretraining(config), resolved)
    disk(2)
    with pytest.raises(SpaceError, match=r"runs/.* has 2\.00 GiB free, expected 4\.\d\d GiB for 3 checkpoints"):
        describe(Pretraining(config), resolved)


def test_a_run_folder_that_cannot_be_written_to_is_refused(
    new_run: Callable[..., Any], make_shards: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run("run")
    assert main([*run.command()[2:], "--dry-run"]) == 0
    assert f"run         {run.folder}, which can be written to\n" in capsys.readouterr().out
    assert not run.folder.exists()
    make_shards(run.folder)  # root may write anywhere, but not a run into a data set
    with pytest.raises(ConfigError, match=r"run: got .*, expected a folder of the run's own"):
        main([*run.command()[2:], "--dry-run"])


def test_weights_that_cannot_be_used_are_refused(new_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="init_from: got nothing, which does not exist"):
        main([*new_run("run").command()[2:], "--dry-run", "init_from=nothing"])


@pytest.mark.slow
def test_what_a_start_would_refuse_in_the_run_folder_is_refused(new_run: Callable[..., Any]) -> None:
    run = new_run("run", overrides=["loader.workers=0", "steps=6"])
    assert run.finish()[0] == 0
    with pytest.raises(CheckpointError, match=r"masking\.mode was 'exact', now 'random'"):
        main([*run.command()[2:], "masking.mode=random", "--dry-run"])


def test_ranks_are_the_launchers_where_one_has_started_them(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--ranks: got 2, expected 4, as many as the launcher has started"):
        main([*new_run("run").command()[2:], "--ranks", "2"])


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


@pytest.mark.parametrize(
    ("settings", "kept", "memory", "size"),
    [  # 91,965,776 parameters, of which 84,934,656 are in the matrices of the blocks
        (["name=adamw"], "exp_avg of 91,965,776, exp_avg_sq of 91,965,776", "701.6 MiB", "1.03 GiB"),
        (["name=lion", "eps=1e-8"], "exp_avg of 91,965,776 parameters", "350.8 MiB", "701.6 MiB"),
        (["name=muon"], "momentum_buffer of 84,934,656 parameters", "377.6 MiB", "728.5 MiB"),
    ],
)
def test_memory_and_checkpoints_are_those_of_the_optimizer(
    settings: list[str], kept: str, memory: str, size: str
) -> None:
    overrides = [f"optimizer.{setting}" for setting in settings]
    config = load_recipe(PretrainingConfig, None, ["run=r", *overrides])
    resolved = resolve(config, read_ds_config(CONFIGS / "deepspeed" / "zero0.json"), 1)
    text = describe(Pretraining(config), resolved)
    assert kept in text
    assert f"optimizer {memory} +" in text
    assert f"checkpoint  {size}; " in text
    assert ("ignored     optimizer.eps: not used by lion" in text) is ("eps=1e-8" in settings)


def test_memory_follows_stage_and_precision() -> None:
    def of(stage: int, precision: str, accumulation: str, ranks: int = 4, kept: int = 2) -> int:
        resolved = Resolved(ranks, 1, 1, stage, precision, accumulation, {})
        return sum(state_bytes(resolved, 1000, 1000 * kept).values()) // 1000

    assert of(0, "fp32", "fp32") == 16  # weights, gradients, two moments
    assert of(0, "bf16", "bf16") == 16
    assert of(1, "fp32", "fp32") == 4 + 4 + 3
    assert of(1, "bf16", "bf16") == 2 + 2 + 3
    assert of(1, "bf16", "fp32") == 2 + 6 + 3  # BF16_Optimizer holds both sums
    assert of(2, "bf16", "bf16") == 2 + 0 + 3  # half a byte each
    assert of(3, "bf16", "fp32", ranks=1) == 2 + 4 + 12
    assert of(3, "bf16", "fp32", ranks=1, kept=1) == 2 + 4 + 8
