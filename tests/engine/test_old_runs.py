"""Runs that were made before runs had a kind, targets and optimizers by name are continued as if nothing was.

``old_runs`` has two, cut after step 6 of 12 as a kill leaves them, and what the old version made of the rest:
``first`` at ZeRO 0 on one rank, ``second`` at ZeRO 1 on two, with an average and a held-out loss. Both are of
beit_dist 0.1.0, on shards that the tests' own writer makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import Run

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import validate
from beit_dist.errors import ConfigError
from beit_dist.weights.stored import open_weights

ROOT = Path(__file__).parents[2]
OLD = Path(__file__).parent / "old_runs"
RECIPE = """\
data: shards
model: {size: tiny, width: 16, depth: 2, heads: 2, image_size: 16, patch_size: 4, vocabulary: 16, drop_path: 0.2}
masking: {min_block: 2}
global_batch: 8
micro_batch: 2
steps: 12
precision: fp32
optimizer: {lr: 1e-2, warmup_steps: 3}
loader: {workers: 0, lanes: 4}
checkpoint: {every_steps: 6, every_minutes: null}
logging: {every_steps: 1, metrics_port: null}
"""
SECOND = ["ema.decay=0.9", "validation.data=held-out", "validation.every_steps=3", "validation.samples=8"]


@pytest.fixture
def old(tmp_path: Path, make_shards: Callable[..., Any]) -> Callable[..., Run]:
    """``old("first")``: the run, where it can be continued."""
    sizes = {"image_size": 16, "patch_size": 4, "vocabulary": 16}
    make_shards(tmp_path / "shards", [20, 12], views=2, **sizes)
    make_shards(tmp_path / "held-out", [8], views=1, seed=1, **sizes)
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def make(name: str, ds: str, ranks: int, *overrides: str) -> Run:
        shutil.copytree(OLD / name, tmp_path / name)
        ds_config = ROOT / "configs" / "deepspeed" / ds
        data, recipe = tmp_path / "shards", tmp_path / "recipe.yaml"
        return Run(tmp_path / name, data, recipe, ds_config, ranks, list(overrides))

    return make


def assert_like_the_old_version(run: Run, name: str) -> None:
    """Same samples, masks and rates; the sums to rounding, as this may be another processor."""
    assert [line["step"] for line in run.lines()] == list(range(1, 13))
    expected = [json.loads(line) for line in (OLD / f"{name}-metrics.jsonl").read_text().splitlines()]
    for got, was in zip(run.lines()[6:], expected, strict=True):
        for key in ("step", "samples", "epoch", "masked", "bad", "batch", "lr", "skipped"):
            assert got[key] == was[key], key
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(was[key], rel=1e-4), key


@pytest.mark.slow
def test_a_run_of_the_version_before_is_continued_as_that_version_would(old: Callable[..., Run]) -> None:
    run = old("first", "zero0.json", 1)
    code, output = run.finish()
    assert code == 0, output
    assert "resumed from step-00000006.a0001: step 6 of " in output
    assert "changed on resume" not in output
    assert run.facts()["kind"] == "pretraining"
    assert_like_the_old_version(run, "first")
    with pytest.raises(ConfigError, match=r"storage\.s3_reader"):  # gone since; of what is recorded it is left out
        validate(PretrainingConfig, yaml.safe_load((OLD / "first" / "config.yaml").read_text()))
    assert open_weights(OLD / "first").config.model.target == "tokens"


@pytest.mark.slow
def test_so_is_one_of_two_ranks_with_an_average_and_held_out_data(old: Callable[..., Run]) -> None:
    run = old("second", "zero1.json", 2, "masking.mode=original", *SECOND)
    code, output = run.finish()
    assert code == 0, output
    assert_like_the_old_version(run, "second")
    results = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    was = [json.loads(line) for line in (OLD / "second-validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in results] == [3, 6, 9, 12]
    for got, before in zip(results[2:], was, strict=True):
        assert got["loss"] == pytest.approx(before["loss"], rel=1e-4)
        assert (got["accuracy"], got["masked"]) == (pytest.approx(before["accuracy"]), before["masked"])


@pytest.mark.slow
def test_what_cannot_change_is_refused_in_an_old_run_too(old: Callable[..., Run]) -> None:
    run = old("first", "zero0.json", 1, "masking.mode=paper")
    code, output = run.finish()
    assert code == 2, output
    assert "cannot be continued: masking.mode was 'exact', now 'paper'" in output
