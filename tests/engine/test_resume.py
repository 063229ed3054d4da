"""What a run may be continued with, and what of it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config import TrainConfig, load_recipe
from beit_dist.engine.resume import compare_recipes
from beit_dist.errors import CheckpointError
from beit_dist.tokenizer_config import TokenizerRecipe

PRETRAINING = load_recipe(TrainConfig, None, ["run=r"])
TOKENIZER = load_recipe(TokenizerRecipe, Path(__file__).parents[2] / "configs" / "tokenizer_demo.yaml", ["run=r"])


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [(TOKENIZER, PRETRAINING, "a tokenizer's training"), (PRETRAINING, TOKENIZER, "pre-training")],
)
def test_the_run_of_another_command_is_named_and_not_all_that_differs(
    old: TrainConfig | TokenizerRecipe, new: TrainConfig | TokenizerRecipe, kind: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare_recipes(new, {"config": old.model_dump(mode="json")}, loud=False)
    assert str(caught.value) == f"run r cannot be continued: it is {kind}. Choose another run folder."


def test_that_an_average_is_given_up_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    averaged = load_recipe(TrainConfig, None, ["run=r", "ema.decay=0.9"])
    compare_recipes(PRETRAINING, {"config": averaged.model_dump(mode="json")}, loud=True)
    assert capsys.readouterr().out == "changed on resume: ema.decay was 0.9, now None\n"


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
