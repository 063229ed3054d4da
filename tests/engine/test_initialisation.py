"""A new run starts from exactly the weights of another, at every stage, or says what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit_dist.config import TrainConfig, load_recipe
from beit_dist.engine.checkpoint.layout import Saved, committed
from beit_dist.engine.checkpoint.weights import StoredWeights, load_weights
from beit_dist.engine.initialisation import check_fit, initialise_from
from beit_dist.errors import CheckpointError, ConfigError
from beit_dist.storage.local import LocalPlace

SHAPES = {"a": [2, 3], "b": [4]}


def stored(shapes: dict[str, list[int]], **model: Any) -> StoredWeights:
    config = TrainConfig(run="old", model={"size": "tiny", **model})
    return StoredWeights(
        Saved(LocalPlace(Path("step")), 1, 1, {"parameters": shapes, "config": config.model_dump()})
    )


def config(**model: Any) -> TrainConfig:
    return TrainConfig(run="new", init_from="runs/old", model={"size": "tiny", **model})


def test_the_same_model_fits() -> None:
    check_fit(config(), SHAPES, stored(dict(reversed(SHAPES.items()))))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"a": [2, 3]}, "b is missing"),
        ({**SHAPES, "c": [1]}, "c is no parameter of this model"),
        ({"a": [3, 2], "b": [4]}, r"a is \[3, 2\], not \[2, 3\]"),
        ({**SHAPES, **{f"c{i}": [1] for i in range(9)}}, "c3 is no parameter of this model; and 5 more"),
    ],
)
def test_other_parameters_are_named(theirs: dict[str, list[int]], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_from: got 'runs/old', expected weights of .*{said}"):
        check_fit(config(), SHAPES, stored(theirs))


@pytest.mark.parametrize(("name", "value"), [("heads", 6), ("pixel_mean", (0.4, 0.4, 0.4))])
def test_settings_that_give_the_same_shapes_another_meaning_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{name}"):
        check_fit(config(), SHAPES, stored(SHAPES, **{name: value}))


def test_the_name_of_a_model_in_a_hub_is_not_taken_for_a_run(tmp_path: Path) -> None:
    alone = SimpleNamespace(ranks=SimpleNamespace(rank=0), from_rank_0=lambda value: value)
    start = partial(initialise_from, shapes=SHAPES, tokenizer="t", state=None, agreement=alone)  # type: ignore[arg-type]
    name = "microsoft/beit-base-patch16-224-pt22k"
    with pytest.raises(
        CheckpointError, match=rf"got {name}, which is not there, .*Download a model of a hub first"
    ):
        start(TrainConfig(run="new", init_from=name))
    with pytest.raises(CheckpointError, match="got nothing committed, expected a run folder"):
        start(TrainConfig(run="new", init_from=str(tmp_path)))


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
        assert f"weights of {old.folder}, step-00000006.a0001; the optimizer starts anew" in output
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
    assert "the optimizer starts anew" not in output
    assert "init_from is ignored: the run has weights of its own" in output
    assert json.loads((new.folder / "run.json").read_text())["init_from"]["source"] == str(old.folder)
    code, output = old.finish(f"init_from={new.folder}", "steps=7")
    assert code == 0, output
    assert "init_from is ignored" in output


def test_the_setting_is_off_by_default() -> None:
    assert load_recipe(TrainConfig, None, ["run=r"]).init_from is None
