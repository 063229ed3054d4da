"""``--dry-run``: everything that can be known before a run starts, computed and printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from beit_dist.checkpoints.layout import Saved
from beit_dist.engine.initialisation import find_origin
from beit_dist.engine.introduction import aligned, baseline_rows, length_rows, setup_rows
from beit_dist.engine.measuring import measure
from beit_dist.engine.memory import (
    in_words,
    kept_by_optimizer,
    parameter_shapes,
    size_of_checkpoint,
    training_bytes,
)
from beit_dist.engine.optimizers.table import check_model, ignored_settings
from beit_dist.engine.proportions import remarks, remarks_on_time
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.refusal import check_space, compare, refuse, refuse_fruitless
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import newest_saved, progress_of
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.engine.task import OPERATIONS, Described, Task
from beit_dist.storage.place import is_url

AnyTask = Task[Any, Any, Any]
_WIDTH = 10  # of the longest name, "parameters": what was measured lines up with what was said before


def dry_run(task: AnyTask, resolved: Resolved, ranks: Ranks, *, measured: bool = False) -> int:
    """Print what can be known of a run before it starts; 0, the exit code.

    Args:
        task: of the run.
        resolved: for the ranks that the run shall have; where it is measured, for those that were started.
        ranks: this process among them.
        measured: take some of the run's steps, to tell how long it takes. Collective.
    """
    if ranks.rank == 0:
        print(describe(task, resolved, measured=measured), flush=True)
    if measured:
        timing = measure(task, resolved, ranks)
        if ranks.rank == 0:
            steps, left = _length(task, newest_saved(task.config.run))
            rows = [*timing.rows(task.config.global_batch, steps, left)]
            rows += [("note", text) for text in remarks_on_time(task.config, steps * timing.median)]
            print(aligned(rows, _WIDTH), flush=True)
    return 0


def describe(task: AnyTask, resolved: Resolved, *, measured: bool = False) -> str:
    """The resolved run as text, one subject a line; without data its plan and the steps are left out.

    Args:
        measured: how long the run takes is told elsewhere.

    Raises:
        UserError: what a start would refuse too.
    """
    check_model(task.config.optimizer, parameter_shapes(task))
    run, saved = RunFolder(task.config.run, task.config.storage.access), newest_saved(task.config.run)
    manifest = saved.manifest if saved else None
    resolved = task.settle_alone(resolved, manifest)
    rows = [_run_row(task, run), *task.describe_model(resolved), *setup_rows(task, resolved)]
    rows += [*_cost_rows(task, resolved), _checkpoint_row(task, run)]
    if task.config.data is None:
        rows.append(("data", "none given: its plan, the steps and the schedule are skipped (add data=...)"))
        if manifest is not None:
            compare(task, manifest, loud=True)
    else:
        rows += task.describe_data(resolved)
        refuse(task, manifest, loud=True)
        if run.place.is_local:
            refuse_fruitless(task, run, manifest)
        rows += [*baseline_rows(task, task.baselines()), *length_rows(task, progress_of(task, manifest))]
        if manifest is None and task.config.init_from is not None and not is_url(task.config.run):
            find_origin(task)
        rows.append(("resumes", _resumed(task, saved)))
        if not measured:
            rows.append(("duration", "not known; add --measure to time some steps on this machine"))
        rows += [("note", text) for text in _remarks(task, saved)]
    return aligned(rows, _WIDTH)


def _length(task: AnyTask, saved: Saved | None) -> tuple[int, int]:
    """Steps of the run, and how many are left."""
    progress = progress_of(task, saved.manifest if saved else None)
    steps = steps_of(task.config, task.epoch_samples, progress.step, progress.samples)
    return steps, max(0, steps - progress.step)


def _resumed(task: AnyTask, saved: Saved | None) -> str:
    run, (steps, left) = task.config.run, _length(task, saved)
    if saved is None:
        return "not looked at: the run is in a store" if is_url(run) else "nothing: a new run"
    if not left:
        return f"nothing is left to do after step {saved.step:,} of {steps:,}, {saved.folder}"
    return f"from step {saved.step:,} of {steps:,}, {saved.folder}"


def _remarks(task: AnyTask, saved: Saved | None) -> Iterator[str]:
    config, samples, at = task.config, task.epoch_samples, progress_of(task, saved.manifest if saved else None)
    return remarks(
        config,
        samples=samples,
        steps=_length(task, saved)[0],
        schedule=schedule_of(config, samples, at.first_batch, at.step, at.samples),
        views=task.views,
        evaluates=task.evaluates,
    )


def _cost_rows(task: AnyTask, resolved: Resolved) -> Described:
    config, work = task.config, task.multiply_adds
    yield (
        "FLOPs",
        f"{OPERATIONS * work / 1e9:.4g} G per image: {OPERATIONS} × {work / 1e9:.4g} G multiply-adds forward",
    )
    name = config.optimizer.name
    roles = [f"{role} of {values:,}" for role, values in kept_by_optimizer(task).items()]
    yield "optimizer", f"{name}, which keeps {', '.join(roles)} parameters"
    if ignored := [f"optimizer.{setting}" for setting in ignored_settings(config.optimizer)]:
        yield "ignored", f"{', '.join(ignored)}: not used by {name}"
    parts, activations = training_bytes(task, resolved), task.activation_bytes(resolved)
    listed = " + ".join(f"{name} {in_words(size)}" for name, size in parts.items())
    total = in_words(sum(parts.values()) + activations)
    yield "memory", f"{total} a rank: {listed} + activations about {in_words(activations)}"


def _run_row(task: AnyTask, run: RunFolder) -> tuple[str, str]:
    """Where the run lies; a folder that cannot be written to is refused, a store is not looked at."""
    if not run.place.is_local:
        return "run", task.config.run
    run.check_writable()
    return "run", f"{task.config.run}, which can be written to"


def _checkpoint_row(task: AnyTask, run: RunFolder) -> tuple[str, str]:
    """What checkpoints take of the disk; too little room is refused, unless nothing is left to do."""
    size, keep = size_of_checkpoint(task), task.config.checkpoint.keep
    said = f"{in_words(size)}; {keep} are kept while one is written: {in_words(size * (keep + 1))} needed"
    if run.place.is_local and task.finished(run) is None:
        said += f", {in_words(check_space(run.path, size, keep))} free"
    return "checkpoint", said
