"""The rank that the others wait for is named, when it stays the same and costs something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.engine.metrics import Metrics
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.ranks.stragglers import PATIENCE, Stragglers

TRAIN = Path(__file__).parents[3] / "beit_dist" / "train.py"
HOSTS = ["a", "a", "b", "b"]


class Told(Agreement):
    """Rank 0 among four; the others' own times are given."""

    def __init__(self, *others: float) -> None:
        super().__init__(Ranks(), timedelta(seconds=1))
        self.others = others
        self.own: list[float] = []

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        self.own += values
        return [list(values), *([other] for other in self.others)]


def test_the_slowest_rank_is_exported_and_named_once_after_several_intervals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    watched = Stragglers(Told(0.1, 0.3, 0.1), HOSTS, torch.device("cpu"), metrics)
    for interval in range(1, PATIENCE + 3):
        watched.step_ended(wait_seconds=0.1)
        watched._since -= 1.0  # the step took a second
        watched.compare()
        assert len(caplog.records) == (interval >= PATIENCE)
    assert "rank 2 on b holds up the others: 0.300 s of its own in a step, 2.0 times the mean" in caplog.text
    value = metrics.registry.get_sample_value
    assert value("beit_train_slowest_rank") == 2
    assert value("beit_train_step_duration_max_over_mean_ratio") == pytest.approx(2.0)
    assert value("beit_train_straggler_cost_ratio") == pytest.approx(0.15, abs=0.01)  # of a second


@pytest.mark.parametrize(
    ("others", "step"),
    [
        ([(0.1, 0.12, 0.1)] * 9, 1.0),  # within what is usual
        ([(0.1, 0.3, 0.1), (0.3, 0.1, 0.1)] * 5, 1.0),  # not always the same
        ([(0.001, 0.003, 0.001)] * 9, 1.0),  # twice as much, of nothing
    ],
)
def test_nobody_is_named_for_chance_or_trifles(
    others: list[tuple[float, ...]], step: float, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    watched = Stragglers(told, HOSTS, torch.device("cpu"), None)
    for told.others in others:
        watched.step_ended(wait_seconds=others[0][0])
        watched._since -= step
        watched.compare()
    assert not caplog.records


def test_own_time_is_averaged_over_the_interval_and_starts_anew() -> None:
    told = Told()
    watched = Stragglers(told, ["a"], torch.device("cpu"), None)
    for wait in (0.5, 1.5):
        watched.step_ended(wait)
    with watched.own_time():
        pass
    watched.compare()
    watched.step_ended(0.0)
    watched.compare()
    assert told.own[0] == pytest.approx(1.0, abs=0.1)
    assert told.own[1] == 0.0


@pytest.mark.slow
def test_a_rank_that_computes_slowly_is_named(new_run: Callable[..., Any]) -> None:
    """Rank 1 needs 0.15 s more in each forward pass than rank 0."""
    run = new_run("run", ranks=2, overrides=["loader.workers=0", "steps=13", "logging.every_steps=4"])
    run.overrides += ["checkpoint.every_steps=null"]
    run.entry = run.folder.parent / "slow.py"
    run.entry.write_text(
        "import os, runpy, time\n"
        "from beit_dist.models.mim import MaskedImageModel\n"
        "forward = MaskedImageModel.forward\n"
        "def slow(self, *inputs, **named):\n"
        "    time.sleep(0.15 if os.environ['RANK'] == '1' else 0)\n"
        "    return forward(self, *inputs, **named)\n"
        "MaskedImageModel.forward = slow\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 0, output
    assert output.count("holds up the others") == 1
    assert "rank 1 on " in output
