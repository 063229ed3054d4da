"""What a run may be continued with, and what of it is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.resume import compare_kinds, compare_recipes
from beit_dist.errors import CheckpointError, ConfigError
from beit_dist.tasks.pretraining.task import Pretraining

PRETRAINING = load_recipe(PretrainingConfig, None, ["run=r"])
BOTH: dict[str, Any] = {"frozen": Pretraining.frozen, "shown": Pretraining.shown}


@pytest.mark.parametrize("kind", ["pretraining", "tokenizer"])
def test_a_run_of_another_kind_is_refused_by_its_kind_alone(kind: str) -> None:
    other = {"pretraining": "tokenizer", "tokenizer": "pretraining"}[kind]
    compare_kinds("r", kind, {"kind": kind})
    with pytest.raises(CheckpointError, match=f"^run r cannot be continued: it holds a {other} run, and"):
        compare_kinds("r", kind, {"kind": other})


def test_of_the_runs_without_a_kind_a_tokenizers_is_refused_with_its_version() -> None:
    compare_kinds("r", "pretraining", {"config": {}})
    old = {"codebook": {}, "versions": {"beit_dist": "0.1.0"}}
    with pytest.raises(CheckpointError, match=r"begun with beit_dist 0\.1\.0, whose settings had other names"):
        compare_kinds("r", "tokenizer", old)
    with pytest.raises(CheckpointError, match="it holds a tokenizer run"):
        compare_kinds("r", "pretraining", old)


def test_a_setting_that_the_old_recipe_lacks_had_the_value_that_is_the_default_now() -> None:
    old = PRETRAINING.model_dump(mode="json")
    del old["masking"]["ratio"], old["ema"]
    compare_recipes(PRETRAINING, old, loud=True, **BOTH)
    other = load_recipe(PretrainingConfig, None, ["run=r", "masking.ratio=0.3"])
    with pytest.raises(CheckpointError, match=r"masking\.ratio was 0\.4, now 0\.3"):
        compare_recipes(other, old, loud=True, **BOTH)


def test_a_run_keeps_its_optimizer_and_one_that_is_older_than_the_setting_has_adamw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = PRETRAINING.model_dump(mode="json")
    del old["optimizer"]["name"], old["optimizer"]["muon"]
    compare_recipes(PRETRAINING, old, loud=True, **BOTH)
    assert capsys.readouterr().out == ""
    lion = load_recipe(PretrainingConfig, None, ["run=r", "optimizer.name=lion"])
    with pytest.raises(CheckpointError) as caught:
        compare_recipes(lion, old, loud=True, **BOTH)
    assert str(caught.value) == (
        "run r cannot be continued: optimizer.name was 'adamw', now 'lion'. Restore the settings, or choose "
        "another run folder."
    )


def test_places_of_an_old_recipe_need_not_be_reached_and_settings_that_are_gone_are_left_out() -> None:
    old = PRETRAINING.model_dump(mode="json")
    old["data"], old["storage"]["s3_reader"] = "gs://bucket/shards", "obstore"  # its package is not installed
    compare_recipes(PRETRAINING, old, loud=True, **BOTH)
    with pytest.raises(ConfigError, match="gcsfs"):
        load_recipe(PretrainingConfig, None, ["run=r", "data=gs://bucket/shards"])
    old["seed"] = "many"
    with pytest.raises(
        CheckpointError, match=r"cannot be continued: its recorded recipe is not valid: seed: got 'many'"
    ):
        compare_recipes(PRETRAINING, old, loud=True, **BOTH)


def test_that_an_average_is_given_up_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    averaged = load_recipe(PretrainingConfig, None, ["run=r", "ema.decay=0.9"])
    compare_recipes(PRETRAINING, averaged.model_dump(mode="json"), loud=True, **BOTH)
    assert capsys.readouterr().out == "changed on resume: ema.decay was 0.9, now None\n"


def test_a_run_of_a_version_without_targets_and_random_masks_may_be_continued() -> None:
    old = PRETRAINING.model_dump(mode="json")
    del old["model"]["target"], old["model"]["pixels"]
    compare_recipes(PRETRAINING, old, loud=False, **BOTH)
    pixels = load_recipe(PretrainingConfig, None, ["run=r", "model.target=pixels"])
    with pytest.raises(CheckpointError, match=r"model\.target was 'tokens', now 'pixels'"):
        compare_recipes(pixels, old, loud=False, **BOTH)


@pytest.mark.slow
def test_a_run_continued_with_another_global_batch_ends_with_the_step_that_completes_its_epochs(
    new_run: Callable[..., Any],
) -> None:
    run = new_run("run", overrides=["loader.workers=0"])
    assert run.finish("epochs=1")[0] == 0
    assert len(run.lines()) == 10  # of 16 of the 147 samples
    code, output = run.finish("epochs=2", "global_batch=8")
    assert code == 0, output
    assert [line["step"] for line in run.lines()] == list(range(1, 28))
    assert run.lines()[-1]["samples"] == 160 + 17 * 8  # 294 are two epochs
