"""A new run starts from exactly the weights of another, at every stage, or says what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit_dist.checkpoints.layout import Saved, committed
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.initialisation import check_shapes, find_origin
from beit_dist.engine.memory import parameter_shapes
from beit_dist.engine.refusal import RefusedError
from beit_dist.errors import CheckpointError, ConfigError, WeightsError
from beit_dist.storage.local import LocalPlace
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.weights.foreign import Foreign
from beit_dist.weights.stored import StoredWeights, load_weights

SHAPES = {"a": [2, 3], "b": [4]}


def stored(shapes: dict[str, list[int]], **model: Any) -> StoredWeights:
    config = PretrainingConfig(run="old", model={"size": "tiny", **model})
    return StoredWeights(
        Saved(LocalPlace(Path("step")), 1, 1, {"parameters": shapes, "config": config.model_dump()})
    )


def config(**model: Any) -> PretrainingConfig:
    return PretrainingConfig(run="new", init_from="runs/old", model={"size": "tiny", **model})


def fit(config: PretrainingConfig, shapes: dict[str, list[int]], stored: StoredWeights) -> None:
    """What a new run looks at in the weights of an old one."""
    check_shapes(str(config.init_from), shapes, stored.shapes)
    assert Pretraining(config).from_stored(stored, loud=False) is None


def test_the_same_model_fits() -> None:
    fit(config(), SHAPES, stored(dict(reversed(SHAPES.items()))))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"a": [2, 3]}, "b is missing"),
        ({**SHAPES, "c": [1]}, "c is not a parameter of this model"),
        ({"a": [3, 2], "b": [4]}, r"a is \[3, 2\], not \[2, 3\]"),
        ({**SHAPES, **{f"c{i}": [1] for i in range(9)}}, "c3 is not a parameter of this model; and 5 more"),
    ],
)
def test_other_parameters_are_named(theirs: dict[str, list[int]], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_from: got 'runs/old', expected weights of .*{said}"):
        fit(config(), SHAPES, stored(theirs))


@pytest.mark.parametrize(("name", "value"), [("heads", 6), ("pixel_mean", (0.4, 0.4, 0.4))])
def test_settings_that_give_the_same_shapes_another_meaning_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{name}"):
        fit(config(), SHAPES, stored(SHAPES, **{name: value}))


def test_the_name_of_a_model_in_a_hub_is_not_taken_for_a_run(tmp_path: Path) -> None:
    name = "microsoft/beit-base-patch16-224-pt22k"
    with pytest.raises(
        CheckpointError, match=rf"got {name}, which does not exist, .*Download a model from a hub first"
    ):
        find_origin(Pretraining(PretrainingConfig(run="new", init_from=name)))
    with pytest.raises(CheckpointError, match="got nothing committed, expected a run folder"):
        find_origin(Pretraining(PretrainingConfig(run="new", init_from=str(tmp_path))))


def test_a_file_that_one_rank_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    task = Pretraining(PretrainingConfig(run="new", init_from=str(tmp_path / "there.safetensors")))
    said: list[Any] = []

    def agreement(others: list[Any]) -> Any:
        ranks = SimpleNamespace(rank=0)
        return SimpleNamespace(ranks=ranks, gather=lambda own: [said.append(own) or own, *others])

    with pytest.raises(WeightsError, match="which does not exist"):
        find_origin(task, agreement([None]))
    assert said[0] == (str(said[0][0]), 2)
    lacking = tuple(parameter_shapes(task))
    task.foreign = lambda source: Foreign({}, "", may_lack=lacking)  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="which does not exist") as refused:
        find_origin(task, agreement(said[:1]))
    assert refused.value.exit_code == 2


@pytest.mark.slow
def test_a_new_run_starts_from_exactly_the_weights_of_another(new_run: Callable[..., Any]) -> None:
    """The first update of a warm-up has learning rate 0: after it the weights are still those it began with."""
    bf16 = {"bf16": {"enabled": True}}
    old = new_run("old", overrides=["loader.workers=0", "steps=6"])
    assert old.finish()[0] == 0
    weights = load_weights(old.folder)[0]
    for name, ds, ranks in (
        ("stage 0, bf16", {"zero_optimization": {"stage": 0}, **bf16}, 1),
        ("stage 1, fp32 sums", "zero1.json", 2),
        ("stage 3, bf16", {"zero_optimization": {"stage": 3}, **bf16}, 1),
    ):
        new = new_run(
            name.replace(" ", "-"),
            ds,
            ranks,
            ["loader.workers=0", "optimizer.warmup_steps=1", f"init_from={old.folder}"],
        )
        code, output = new.finish("steps=2", "checkpoint.every_steps=1", "checkpoint.keep=9", "ema.decay=0.5")
        assert code == 0, output
        assert f"weights of {old.folder}, step-00000006.a0001; the optimizer starts from scratch" in output
        first = min(committed(LocalPlace(new.folder / "checkpoints")), key=lambda saved: saved.step)
        for role, got in (
            ("weight", load_weights(first.folder.path)[0]),
            ("ema", load_weights(first.folder.path, ema=True)[0]),
        ):
            assert all(torch.equal(got[key], weights[key]) for key in weights), (name, role)
        assert first.manifest["updates"] == 1
        assert first.manifest["init_from"]["checkpoint"] == "step-00000006.a0001"
        assert new.lines()[0]["loss"] != old.lines()[0]["loss"]

    code, output = new.finish("steps=3")
    assert code == 0, output
    assert "the optimizer starts from scratch" not in output
    assert "init_from is ignored: the run has weights of its own" in output
    assert json.loads((new.folder / "run.json").read_text())["init_from"]["source"] == str(old.folder)
    code, output = old.finish(f"init_from={new.folder}", "steps=7")
    assert code == 0, output
    assert "init_from is ignored" in output


def test_the_setting_is_off_by_default() -> None:
    assert load_recipe(PretrainingConfig, None, ["run=r"]).init_from is None
