"""At its end a run says how far beyond the baselines it has come on held-out images, and what to do next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import validate
from beit_dist.engine.conclusion import conclusion, verdict
from beit_dist.engine.run_folder import RunFolder
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.step_numbers import Baseline, KnownBaselines, Number
from beit_dist.tasks.pretraining.task import Pretraining

HELD_OUT = {
    "loss": [Baseline("uniform", 6.2383), Baseline("frequency", 4.11)],
    "accuracy": [Baseline("commonest token", 0.0559)],
}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"loss": 3.41, "accuracy": 0.123},
            "loss 3.4100, 0.70 below frequency (4.1100); accuracy 12.3%, 2.2 times commonest token (5.6%)",
        ),
        (
            {"loss": 4.12, "accuracy": 0.0557},
            "loss 4.1200, not beyond frequency (4.1100); accuracy 5.6%, not beyond commonest token (5.6%)",
        ),
        ({"loss": None, "accuracy": 0.0}, "accuracy 0.0%, not beyond commonest token (5.6%)"),
    ],
)
def test_a_verdict_compares_with_the_strongest_baseline(values: dict[str, Any], said: str) -> None:
    assert "; ".join(verdict(TokensHead.numbers, values, HELD_OUT)) == said


def test_without_baselines_the_numbers_stand_alone() -> None:
    assert list(verdict(TokensHead.numbers, {"loss": 3.41, "accuracy": 0.1}, {})) == [
        "loss 3.4100",
        "accuracy 10.0%",
    ]


def ended(tmp_path: Path, losses: list[float]) -> list[str]:
    run = RunFolder(tmp_path / "my run")
    run.create()
    with run.validation.open("w") as file:
        for number, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": 10 * number, "loss": loss, "accuracy": 0.2}) + "\n")
    task = Pretraining(validate(PretrainingConfig, {"run": str(tmp_path / "my run")}))
    return conclusion(task, run, (30, 30), 75.0, KnownBaselines(held_out=HELD_OUT)).splitlines()


def test_the_last_and_the_best_held_out_numbers_are_told_and_what_comes_next(tmp_path: Path) -> None:
    lines = ended(tmp_path, [4.0, 3.5, 3.6])
    assert lines[0] == f"done: step 30 of 30 in 1:15, run folder {tmp_path / 'my run'}"
    assert lines[1].startswith("held out: loss 3.6000, 0.51 below frequency (4.1100); accuracy 20.0%")
    assert lines[2] == "best: loss 3.5000 at step 20"
    assert lines[-3:] == [
        "next:",
        f"  beit pictures '{tmp_path / 'my run'}'",
        f"  beit export '{tmp_path / 'my run'}' --to hf --out exported/",
    ]
    assert not any(line.startswith("best") for line in ended(tmp_path, [4.0, 3.5]))


def test_a_run_without_held_out_images_says_that_nothing_is_known(tmp_path: Path) -> None:
    assert "not known what the model has learnt" in ended(tmp_path, [])[1]


def test_more_is_better_where_a_number_says_so() -> None:
    psnr = Number(name="psnr", help="A.", text="PSNR {:.2f} dB", better="higher")
    baseline = Baseline("mean colour", 18.0)
    assert psnr.beyond(21.0, baseline) == "3.00 above mean colour (18.00)"
    assert psnr.strongest([baseline, Baseline("palette", 20.0)]) == ("palette", 20.0)
    assert psnr.strongest([]) is None
