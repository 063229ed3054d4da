"""The average of the weights: its arithmetic, and that it is saved, restored and moved like the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from beit_dist.checkpoints.layout import Fragment, committed
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import validate
from beit_dist.engine.average import WeightAverage
from beit_dist.errors import CheckpointError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.storage.local import LocalPlace
from beit_dist.weights.stored import load_weights

BF16 = {"bf16": {"enabled": True}}


class State:
    """Stands in for the engine's state."""

    def __init__(self) -> None:
        self.weights = [torch.arange(4.0), torch.ones(3)]
        self.attached: list[Fragment] = []

    def owned_weights(self) -> list[Fragment]:
        return [Fragment("p", "weight", 10 * i, weight) for i, weight in enumerate(self.weights)]

    def attach(self, fragments: Any) -> None:
        self.attached += fragments


def test_an_update_moves_the_average_by_the_rest_of_the_decay() -> None:
    state: Any = State()
    average = WeightAverage(state, 0.75)
    for weight in state.weights:
        weight += 8
    average.update()
    assert [(f.parameter, f.role, f.start) for f in state.attached] == [("p", "ema", 0), ("p", "ema", 10)]
    assert state.attached[0].data.tolist() == [2, 3, 4, 5]
    average.restart()
    assert state.attached[0].data.tolist() == [8, 9, 10, 11]
    assert state.attached[0].data.data_ptr() != state.weights[0].data_ptr()


@pytest.mark.slow
def test_the_average_is_that_of_every_update_since_the_start(new_run: Callable[..., Any]) -> None:
    settings = ["ema.decay=0.8", "loader.workers=0", "steps=6", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    run = new_run("run", {"zero_optimization": {"stage": 2}, **BF16}, ranks=2, overrides=settings)
    code, output = run.finish()
    assert code == 0, output
    saved = sorted(committed(LocalPlace(run.folder / "checkpoints")), key=lambda found: found.step)
    model = MaskedImageModel(validate(PretrainingConfig, saved[0].manifest["config"]).model)
    model.initialise(0)
    # DeepSpeed makes the masters of the model after casting it to bf16.
    expected = {name: parameter.detach().bfloat16().double() for name, parameter in model.named_parameters()}
    for step in saved:
        for name, weight in load_weights(step.folder.path)[0].items():
            expected[name] = 0.8 * expected[name] + 0.2 * weight.double()
    got = load_weights(run.folder, ema=True)[0]
    for name, average in got.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(got[name], weight) for name, weight in load_weights(run.folder)[0].items())


@pytest.mark.slow
def test_a_resumed_average_is_the_same_to_the_last_bit_and_moves_to_other_stages(
    new_run: Callable[..., Any],
) -> None:
    """Restoring compares a digest of the average with the manifest's, so it is exact or fails."""
    settings = ["ema.decay=0.8", "loader.workers=0", "optimizer.min_lr=0.01", "optimizer.warmup_steps=0"]
    stage_1 = {"zero_optimization": {"stage": 1}, **BF16}
    whole = new_run("whole", stage_1, ranks=2, overrides=[*settings, "steps=8"])
    code, output = whole.finish()
    assert code == 0, output
    cut = new_run("cut", stage_1, ranks=2, overrides=[*settings, "steps=8"])
    shutil.copytree(whole.folder, cut.folder)
    for newer in cut.folder.glob("checkpoints/step-00000008.*"):
        shutil.rmtree(newer)
    code, output = cut.finish()
    assert code == 0, output
    assert "resumed from step-00000007" in output
    assert cut.final_files() == whole.final_files()

    for stage, ranks, steps in ((3, 1, 9), (0, 2, 10)):
        moved = new_run("cut", {"zero_optimization": {"stage": stage}, **BF16}, ranks, settings)
        code, output = moved.finish(f"steps={steps}")
        assert code == 0, output
        assert f"resumed from step-{steps - 1:08d}" in output
        assert "begins with" not in output


@pytest.mark.slow
def test_an_average_can_be_turned_on_and_off(new_run: Callable[..., Any]) -> None:
    run = new_run("run", overrides=["loader.workers=0", "optimizer.min_lr=0.01", "optimizer.warmup_steps=0"])
    assert run.finish("steps=2")[0] == 0
    with pytest.raises(CheckpointError, match=r"ema\.decay"):
        load_weights(run.folder, ema=True)
    before = load_weights(run.folder)[0]
    code, output = run.finish("steps=3", "ema.decay=0.5")
    assert code == 0, output
    assert "ema: the run had no average; it begins with the weights of this checkpoint" in output
    after, average = load_weights(run.folder)[0], load_weights(run.folder, ema=True)[0]
    name = "patch_embed.proj.weight"
    torch.testing.assert_close(average[name], (before[name] + after[name]) / 2)
    code, output = run.finish("steps=4")
    assert code == 0, output
    with pytest.raises(CheckpointError, match=r"ema\.decay"):
        load_weights(run.folder, ema=True)
