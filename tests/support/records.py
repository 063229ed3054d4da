"""Recorders without a run, and the tables of metrics of each kind of training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import validate
from beit_dist.config.run import LoggingConfig
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.metrics import Metric, Metrics, table_of
from beit_dist.engine.record import Recorder, Scope, Taken
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks
from beit_dist.engine.task import Step
from beit_dist.step_numbers import KnownBaselines, Number
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.tasks.tokenizer.task import TokenizerTraining


def tables() -> dict[str, tuple[Metric, ...]]:
    """All metrics of each kind of training."""
    tasks = (
        Pretraining(validate(PretrainingConfig, {"run": "r"})),
        TokenizerTraining(validate(TokenizerConfig, {"run": "r"}), Path("t.safetensors")),
    )
    return {task.kind: table_of((*task.numbers, *task.known), task.measured, task.metrics) for task in tasks}


def taken(step: int, masked: int = 7, applied: bool = True) -> Taken:
    """What the host knows of a step of pre-training."""
    known = {"masked": masked, "bad": 0, "batch": "00"}
    return Taken(
        number=step,
        step=Step(masked, known),
        samples=8 * step,
        epoch=step / 4,
        lr=0.1,
        applied=applied,
        wait_seconds=0.0,
    )


def sums_of(loss: float) -> Tensor:
    """Sums of a step of pre-training: the loss's, and some for the other numbers."""
    others = len(summed()) - 1
    return torch.tensor([loss, *[3.0] * others])


def summed() -> tuple[Number, ...]:
    """What a step of pre-training sums."""
    return Pretraining(validate(PretrainingConfig, {"run": "r"})).numbers


def a_recorder(
    run: RunFolder,
    every: int = 2,
    sinks: Sinks | None = None,
    progress: bool = False,
    baselines: KnownBaselines | None = None,
) -> Recorder:
    """Of a pre-training run."""
    run.create()
    scope = Scope(attempt=3, total_steps=10, batch=8, flops_per_sample=5)
    task = Pretraining(validate(PretrainingConfig, {"run": "r"}))
    settings = LoggingConfig(every_steps=every, progress=progress)
    return Recorder(
        task, run, Metrics(tables()["pretraining"]), settings, scope, sinks, baselines or KnownBaselines()
    )
