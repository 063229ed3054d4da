"""The tables of docs/scaling.md: what ``beit plan`` computes for the shipped 22k recipes on H100s."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from beit_dist.commands.plan import stages, task_from
from beit_dist.engine.device import choose_accelerator
from beit_dist.engine.durations import duration
from beit_dist.engine.task import Task
from beit_dist.planning.devices import GB, GIB, device_named
from beit_dist.planning.limits import limits
from beit_dist.planning.plan import Plan, Question, make_plan, sweep

SAMPLES = 14_200_000
"""Images of ImageNet-22k."""
GPUS = (1, 8, 64, 256, 1024)
LARGER = (64, 256, 1024)
BATCH = 16_384
Rows = Iterator[Sequence[str]]


def speed(recipe: str, *overrides: str) -> Rows:
    """A row for each number of GPUs; of a larger batch, for those that need one."""
    yield "GPUs", "a GPU's batch", "step", "images/s", "exposed exchange", "store sends", "all epochs", "GPU-hours"
    larger = any(setting.startswith("global_batch") for setting in overrides)
    task = _task(recipe, *overrides)
    for gpus, plan in sweep(task, _stages(), _question(), LARGER if larger else GPUS):
        if isinstance(plan, str):
            raise ValueError(plan)
        yield gpus_row(task, gpus, plan)


def gpus_row(task: Task[Any, Any, Any], gpus: int, plan: Plan) -> Sequence[str]:
    """A plan in the columns of :func:`speed`."""
    best, seconds = plan.best, plan.seconds
    if best is None or seconds is None:
        raise ValueError(f"{gpus} GPUs: nothing fits")
    return (
        f"{gpus:,}",
        f"{best.resolved.accumulation} × {best.resolved.micro_batch}",
        f"{1000 * best.step:.1f} ms",
        f"{task.config.global_batch / best.step:,.0f}",
        f"{best.exposed_share:.0%}",
        f"{_two_digits(best.reading.store / GB)} GB/s",
        duration(seconds),
        f"{seconds * gpus / 3600:,.0f}",
    )


def breaking(recipe: str) -> Rows:
    """What breaks, by the number of GPUs."""
    yield "from", "what breaks", "what to change"
    task, ds_configs = _task(recipe), _stages()
    for limit in limits(task, ds_configs, make_plan(task, ds_configs, _question())):
        yield f"{limit.gpus:,}", limit.what, limit.instead


def memory(recipe: str) -> Rows:
    """What a GPU holds on 64 of them, by stage; the micro-batch is what fills the GPU best up to the recipe's."""
    yield "stage", "precision", "weights", "gradients", "optimizer", "activations and logits", "all"
    task = task_from("pretraining", recipe, ["global_batch=8192"])
    for stage in make_plan(task, stages(), _question(64)).stages:
        if stage.choice is None:
            raise ValueError(stage.refused)
        parts = {name: size / GIB for name, size in stage.choice.memory.parts.items()}
        kept = parts["activations"] + parts["logits"]
        state = (f"{parts[name]:.2f}" for name in ("weights", "gradients", "optimizer"))
        total = stage.choice.memory.total / GIB
        yield str(stage.stage), stage.choice.resolved.precision, *state, f"{kept:.2f}", f"{total:.2f}"


def _two_digits(number: float) -> str:
    return f"{number:.2g}" if number < 99.5 else f"{number:.0f}"


def _task(recipe: str, *overrides: str) -> Task[Any, Any, Any]:
    choose_accelerator("cpu", 1)
    return task_from("pretraining", recipe, ["compile=true", *overrides])


def _stages() -> dict[int, dict[str, Any]]:
    """Those that ``compile`` leaves."""
    return {stage: settings for stage, settings in stages().items() if stage < 3}


def _question(gpus: int = 1) -> Question:
    return Question(gpus=gpus, per_node=8, device=device_named("h100", 8), samples=SAMPLES)
