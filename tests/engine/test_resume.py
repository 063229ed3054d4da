"""What a run may be continued with, and what of it is said."""

from __future__ import annotations

from pathlib import Path

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
