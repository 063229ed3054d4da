"""A probe while pre-training: the same numbers on any number of ranks, when they are due, with a baseline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.classes import write_classes
from support.together import together

from beit_dist.commands.pictures import kinds
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.ranks.preemption import StopRequest
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Surroundings
from beit_dist.errors import ConfigError, DataError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.curves import Curves, draw_curves, panels_of
from beit_dist.reports.history import History, Series
from beit_dist.step_numbers import Baseline
from beit_dist.tasks.pretraining.measuring import Measuring
from beit_dist.tasks.pretraining.probe import Probe, open_probe
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.train import main

MODEL = {"width": 16, "depth": 4, "heads": 2, "image_size": 16, "patch_size": 4, "vocabulary": 16}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("labelled"))


def recipe(labelled: Path, **probe: Any) -> PretrainingConfig:
    validation = {"every_steps": 6, "probe": {"data": str(labelled), **probe}}
    return PretrainingConfig(run="r", model=MODEL, masking={"min_block": 2}, validation=validation)


def surroundings(agreement: Any, stop: StopRequest | None = None) -> Surroundings:
    resolved = Resolved(agreement.ranks.world, 4, 1, 0, "fp32", "fp32", {})
    return Surroundings(agreement, torch.device("cpu"), resolved, stop or StopRequest(), lambda: None)


def measure(config: PretrainingConfig, world: int, asked: StopRequest | None = None) -> dict[str, Any] | None:
    """What all of ``world`` ranks measure of a model with its first weights."""
    model, pictures = MaskedImageModel(config.model), open_probe(config)
    model.initialise(0)
    assert pictures is not None
    found = together(
        world, lambda ranks: Probe(config, pictures, surroundings(ranks, asked)).measure(model.state_dict)
    )
    assert all(values == found[0] for values in found)
    return found[0]


def test_ranks_do_not_change_the_numbers(labelled: Path) -> None:
    config = recipe(labelled, layers=[1, 4])
    alone = measure(config, 1)
    assert alone is not None
    assert [layer["layer"] for layer in alone["probe_layers"]] == [1, 4]
    assert alone["probe_linear"] > 0.8
    assert alone["probe_knn"] > 0.8
    for world in (2, 3):
        assert measure(config, world) == alone


def test_a_stop_request_ends_it(labelled: Path) -> None:
    asked = StopRequest()
    asked.name = "SIGTERM"
    assert measure(recipe(labelled), 2, asked) is None


def test_loss_and_probe_are_measured_each_at_its_own_steps(labelled: Path) -> None:
    def due(steps: int, **probe: Any) -> list[int]:
        config = recipe(labelled, **probe)
        masks = Pretraining(config).masks
        (made,) = together(
            1, lambda ranks: Measuring(config, None, open_probe(config), masks, surroundings(ranks))
        )
        return [step for step in range(1, steps + 1) if made.is_due(step, steps)]

    assert due(14) == [6, 12, 14]
    assert due(14, every_steps=4) == [4, 8, 12, 14]


def test_layers_that_are_not_there_and_images_without_classes_are_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.probe\.layers: got 5"):
        open_probe(recipe(labelled, layers=[5]))
    with pytest.raises(DataError, match=r"validation\.probe\.data"):
        open_probe(recipe(labelled / "amber"))
    with pytest.raises(ConfigError, match=r"validation\.probe\.data"):
        recipe("s3:///")  # type: ignore[arg-type]


def test_the_numbers_are_declared_where_something_is_probed_beside_the_commonest_class(labelled: Path) -> None:
    task = Pretraining(recipe(labelled))
    assert [number.name for number in task.measured[-2:]] == ["probe_linear", "probe_knn"]
    assert task.copies == 1
    without = Pretraining(PretrainingConfig(run="r", model=MODEL, masking={"min_block": 2}))
    assert without.measured == without.numbers
    assert without.copies == 0
    known = kinds()["pretraining"].baselines(recipe(labelled)).held_out
    assert known["probe_knn"] == [Baseline("commonest class", pytest.approx(3 / 7))]
    gone = kinds()["pretraining"].baselines(recipe(labelled / "gone"))
    assert "probe_knn" not in gone.held_out


def test_pictures_have_a_curve_of_each_although_the_loss_is_measured_at_other_steps(
    labelled: Path, tmp_path: Path
) -> None:
    kind, config = kinds()["pretraining"], recipe(labelled)
    trained = [{"step": step, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0} for step in range(1, 9)]
    held_out = [{"step": step, "probe_linear": step / 10, "probe_knn": 0.3} for step in (2, 4, 6)]
    history = History(Series(trained), Series([*held_out, {"step": 8, "loss": 2.9}]))
    run = Curves("run", history, kind.numbers(config), kind.measured(config), kind.baselines(config))
    names = [number.name for number in panels_of(run)]
    assert {"probe_linear", "probe_knn"} < set(names)
    draw_curves([run], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_the_dry_run_says_what_is_probed(
    new_run: Callable[..., Any], labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = new_run("run", overrides=["steps=50", f"validation.probe.data={labelled}"]).command()[2:]
    assert main([*command, "--dry-run"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("probe"))
    assert row.endswith(": 29 images to fit to, 7 to test on, 3 classes; layers 1, 2, every 5 steps")
