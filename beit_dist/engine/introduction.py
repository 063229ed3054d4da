"""What a run says of itself before its first step: what is trained, on what, for how long, and from where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from beit_dist.checkpoints.layout import Saved
from beit_dist.engine.durations import counted
from beit_dist.engine.memory import count_parameters
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.engine.task import Described, Progress, Task
from beit_dist.step_numbers import Baselines, KnownBaselines, Number


def introduction_rows(
    task: Task[Any, Any, Any],
    resolved: Resolved,
    saved: Saved | None,
    progress: Progress,
    total_steps: int,
    baselines: KnownBaselines,
    device: str,
) -> Described:
    """All of it, for :func:`aligned`.

    Args:
        saved: the checkpoint that the run continues from; None for a new run.
        device: that this rank computes on.
    """
    start = f"resumed from {saved.folder.name}: step {saved.step} of {total_steps:,}" if saved else "a new run"
    yield "run", f"{task.config.run}, {start}"
    yield from task.introduce(total_steps)
    yield from baseline_rows(task, baselines)
    yield from length_rows(task, progress)
    yield from setup_rows(task, resolved)
    before = saved.manifest.get("world_size") if saved else None
    changed = f" ({before} before)" if before not in (None, resolved.ranks) else ""
    yield "ranks", f"{resolved.ranks}{changed}, on {device}"


def setup_rows(task: Task[Any, Any, Any], resolved: Resolved) -> Described:
    """Size, batch, precision, and how the blocks are computed."""
    yield "parameters", f"{count_parameters(task):,}"
    ranks, of_a_rank = (
        counted(resolved.ranks, "rank"),
        counted(resolved.accumulation, "micro-batch", "micro-batches"),
    )
    yield "batch", f"{task.config.global_batch} = {ranks} × {of_a_rank} of {resolved.micro_batch}"
    yield (
        "precision",
        f"{resolved.precision} ({resolved.why}), gradients summed in {resolved.accumulation_type}, "
        f"ZeRO stage {resolved.stage}",
    )
    if task.paths is not None:
        yield from task.paths.rows()


def length_rows(task: Task[Any, Any, Any], progress: Progress) -> Described:
    """Epochs, steps and the schedule of the learning rate."""
    config, samples = task.config, task.epoch_samples
    at = (progress.step, progress.samples)
    steps = steps_of(config, samples, *at)
    schedule = schedule_of(config, samples, progress.first_batch or config.global_batch, *at)
    epochs = (progress.samples + (steps - progress.step) * config.global_batch) / samples
    views = f"; each of the {task.views} views is seen in every {_nth(task.views)} epoch" if task.views > 1 else ""
    yield "epoch", f"{samples / config.global_batch:.1f} steps of {config.global_batch} images{views}"
    yield "steps", f"{steps:,}, or {epochs:.4g} epochs"
    optimizer = config.optimizer
    yield (
        "schedule",
        f"the learning rate rises to {optimizer.lr:g} over {schedule.warmup:g} steps, then falls along a "
        f"{'line' if optimizer.decay == 'linear' else 'cosine'} to {optimizer.min_lr:g}",
    )


def baseline_rows(task: Task[Any, Any, Any], baselines: KnownBaselines) -> Described:
    """What the numbers come to without learning from images."""
    listed = "; ".join(_listed(task.numbers, baselines.training))
    if listed or baselines.unknown:
        yield "baselines", "; ".join(filter(None, [listed, baselines.unknown]))


def _listed(numbers: Iterable[Number], baselines: Baselines) -> Iterator[str]:
    for number in numbers:
        if number.text is not None and (known := baselines.get(number.name)):
            yield f"{number.name}: " + ", ".join(f"{one.name} {number.form(one.value)}" for one in known)


def _nth(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def aligned(rows: Described, least: int = 0) -> str:
    """Subjects and what there is to say of them, in two columns, the first at least so wide."""
    listed = list(rows)
    width = max(least, *(len(name) for name, _ in listed))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in listed)
