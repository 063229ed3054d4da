"""A start of a run: from a task and resolved settings to a trainer that stands where the run was left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from beit_dist.checkpoints.layout import AVERAGE, Saved
from beit_dist.config.run import LoggingConfig
from beit_dist.engine.average import WeightAverage, gathered
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.compiled import CompiledBlocks
from beit_dist.engine.endpoint import Health
from beit_dist.engine.guard import Guard
from beit_dist.engine.initialisation import Origin, find_origin, initialise_from
from beit_dist.engine.introduction import aligned, introduction_rows
from beit_dist.engine.memory import parameter_shapes, state_shapes
from beit_dist.engine.metrics import Metrics, table_of
from beit_dist.engine.preflight import preflight
from beit_dist.engine.process import Process
from beit_dist.engine.profiling import Profiler
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.engine.ranks.stragglers import Stragglers
from beit_dist.engine.record import Recorder, Scope
from beit_dist.engine.refusal import compare, on_rank_0, refuse
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import progress_of
from beit_dist.engine.run_folder import RunFolder, versions
from beit_dist.engine.saving import Saving
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.engine.sinks import open_sinks
from beit_dist.engine.takeover import introduce, take_over
from beit_dist.engine.task import OPERATIONS, Progress, Running, StartStopped, Surroundings, Task
from beit_dist.engine.trainer import Trainer, Watchers
from beit_dist.engine.wrapped import build_engine
from beit_dist.models.buffers import kept_buffers
from beit_dist.step_numbers import KnownBaselines

AnyTask = Task[Any, Any, Any]


@dataclass(frozen=True)
class Prepared:
    """What is known of a start before it makes anything."""

    resolved: Resolved
    """Settled."""
    trial: dict[str, Any] | None
    """What the preflight measured."""
    origin: Origin | None = None
    """The weights of ``init_from``, for a new run that names some."""


def prepare(task: AnyTask, resolved: Resolved, process: Process, manifest: Mapping[str, Any] | None) -> Prepared:
    """Look at the data and at every rank, with nothing made yet: what is refused here leaves no trace. Collective.

    Args:
        manifest: of the checkpoint that will be continued; None for a new run.

    Raises:
        StartStopped: a rank was asked to stop.
        PreflightError: a rank's host has too little memory, or the ranks' collectives are wrong.
        CheckpointError: the run in the folder is another one.
        ConfigError: the data is too little for the recipe, or ``init_from`` names weights of another model.
        WeightsError: ``init_from`` names a file that cannot be used.
    """
    agreement, device = process.agreement, process.device
    resolved = task.settle(resolved, manifest, agreement, device)
    give_way(process)
    task.prepare(Surroundings(agreement, device, resolved, process.stop, process.watchdog.beat), manifest)
    give_way(process)
    on_rank_0(agreement, lambda: refuse(task, manifest, loud=False))  # once more: some images may be unusable
    trial = preflight(task, resolved, agreement, device) if task.config.preflight else None
    new = manifest is None and task.config.init_from is not None
    origin = find_origin(task, agreement) if new else None
    return Prepared(resolved, trial, origin)


def give_way(process: Process) -> None:
    """Stop here if a rank was asked to: there is nothing to save yet. Collective.

    Raises:
        StartStopped: one was.
    """
    if any(process.agreement.gather(process.stop.name is not None)):
        raise StartStopped


def start(
    task: AnyTask,
    prepared: Prepared,
    process: Process,
    run: RunFolder,
    store: CheckpointStore,
    *,
    saves: bool = True,
) -> Trainer:
    """Build what a trainer needs and restore the newest whole checkpoint. Collective.

    Args:
        saves: False for a trainer that is never asked for a checkpoint: no memory is set aside for the copies.

    Raises:
        StartStopped: a rank was asked to stop.
        CheckpointError: the run in the folder has become another one.
    """
    config, agreement, device = task.config, process.agreement, process.device
    ranks, resolved = agreement.ranks, prepared.resolved
    saved = _take_up(task, store, loud=ranks.rank == 0)
    manifest = saved.manifest if saved else None
    progress = progress_of(task, manifest)
    schedule = schedule_of(config, task.epoch_samples, progress.first_batch, progress.step, progress.samples)
    total_steps = steps_of(config, task.epoch_samples, progress.step, progress.samples)

    baselines = task.baselines() if ranks.rank == 0 else KnownBaselines()
    if ranks.rank == 0:
        rows = introduction_rows(task, resolved, saved, progress, total_steps, baselines, device.type)
        print(aligned(rows), flush=True)

    engine = build_engine(task, resolved, device)
    state, shapes = EngineState(engine, ranks), parameter_shapes(task)
    average = WeightAverage(state, config.ema.decay) if config.ema.decay is not None else None
    origin = _fill(task, store, saved, state, average, agreement, prepared.origin)
    if saves:
        take_over(config, run, store, agreement, state, saved, device)

    metrics = open_metrics(task, resolved, store, progress, total_steps, baselines) if ranks.rank == 0 else None
    process.watchdog.metrics = metrics
    facts = _facts(task, resolved, engine, shapes, origin)
    told = _short(facts, prepared) | {"total_steps": total_steps, "baselines": baselines.plain()}
    port = _serve(metrics, config.logging, lambda: _health(process, run))
    hosts = introduce(run, store, agreement, saved, port, told)
    watchers = Watchers(
        recorder=_recorder(task, run, metrics, store.attempt, total_steps, progress, baselines),
        guard=_guard(task, engine, resolved, agreement, metrics, manifest),
        stragglers=Stragglers(agreement, hosts, device, metrics),
        compiled=CompiledBlocks(engine.module, config.compile, loud=ranks.rank == 0),
        profiler=Profiler(config.profile, run.path / "ranks", ranks.rank),
        metrics=metrics,
    )
    watchers.recorder.listeners.append(watchers.guard.fetched)
    give_way(process)
    fragments = average.fragments if average is not None else state.owned_weights()
    weights, neighbours = partial(gathered, fragments, shapes, device), hosts.count(hosts[ranks.rank])
    task.open(Running(engine, progress, total_steps, run, neighbours, weights, watchers.stragglers.others_wait))
    saving = Saving(store, state, config.checkpoint, process, run, facts, metrics)
    return Trainer(task, engine, process, schedule, total_steps, progress, saving, average, watchers)


def _take_up(task: AnyTask, store: CheckpointStore, *, loud: bool) -> Saved | None:
    """The newest whole checkpoint, which the task now continues; None for a new run. Collective."""
    saved = store.newest_whole()
    manifest = saved.manifest if saved else None
    if manifest is not None:
        compare(task, manifest, loud=loud)
    task.take_up(manifest)
    return saved


def _fill(
    task: AnyTask,
    store: CheckpointStore,
    saved: Saved | None,
    state: EngineState,
    average: WeightAverage | None,
    agreement: Agreement,
    found: Origin | None,
) -> dict[str, Any] | None:
    """Give weights and optimizer their first values; where those of the run came from. Collective."""
    manifest, loud = saved.manifest if saved else None, agreement.ranks.rank == 0
    origin: dict[str, Any] | None = manifest.get("init_from") if manifest else None
    if saved is not None:
        store.restore(saved, state)
        if loud and task.config.init_from is not None:
            print("init_from is ignored: the run has weights of its own", flush=True)
    elif task.config.init_from is not None:
        found = found or find_origin(task, agreement)  # not yet: the checkpoint to be continued was damaged
        origin = initialise_from(task, state_shapes(task), found, state, agreement)
    if average is not None and not (manifest and AVERAGE in manifest["state_digests"]):
        average.restart()
        if manifest and loud:
            print("ema: the run had no average; it begins with the weights of this checkpoint", flush=True)
    return origin


def _health(process: Process, run: RunFolder) -> Health:
    """Of the run. A rank that failed leaves its marker at once, and rank 0 may wait for it for long."""
    health = process.watchdog.health()
    return replace(health, state="failed") if run.has_failed else health


def _serve(metrics: Metrics | None, settings: LoggingConfig, health: Callable[[], Health]) -> int | None:
    """Rank 0: begin to serve the metrics; the port."""
    port = metrics.serve(settings, health) if metrics else None
    if port is not None:
        print(f"metrics: http://{settings.metrics_address}:{port}/metrics", flush=True)
    return port


def _short(facts: Mapping[str, Any], prepared: Prepared) -> dict[str, Any]:
    """What ``run.json`` says of a manifest's facts, and of how they came about."""
    long = ("parameters", "buffers", "groups", "config", "classes")
    told = {name: fact for name, fact in facts.items() if name not in long}
    return told | {"precision_why": prepared.resolved.why, "preflight": prepared.trial}


def _guard(
    task: AnyTask,
    engine: Any,
    resolved: Resolved,
    agreement: Agreement,
    metrics: Metrics | None,
    manifest: Mapping[str, Any] | None,
) -> Guard:
    return Guard(
        task.config.guard,
        agreement,
        engine.module,
        whole=resolved.stage < 3,
        metrics=metrics,
        saved=manifest.get("guard") if manifest else None,
        name_of=task.name_of,
    )


def _facts(
    task: AnyTask, resolved: Resolved, engine: Any, shapes: Mapping[str, list[int]], origin: dict[str, Any] | None
) -> dict[str, Any]:
    """What every manifest of this start says, whatever the step."""
    groups = engine.optimizer.param_groups
    buffers = {name: list(buffer.shape) for name, buffer in kept_buffers(engine.module).items()}
    return {
        "kind": task.kind,
        "stage": resolved.stage,
        "precision": resolved.precision,
        **task.facts,
        "parameters": shapes,
        **({"buffers": buffers} if buffers else {}),
        "init_from": origin,
        "groups": [{"name": group["name"], "weight_decay": group["weight_decay"]} for group in groups],
        "config": task.config.model_dump(mode="json"),
        "versions": versions(),
    }


def _recorder(
    task: AnyTask,
    run: RunFolder,
    metrics: Metrics | None,
    attempt: int,
    total_steps: int,
    progress: Progress,
    baselines: KnownBaselines,
) -> Recorder:
    config = task.config
    scope = Scope(
        attempt=attempt,
        total_steps=total_steps,
        batch=config.global_batch,
        flops_per_sample=OPERATIONS * task.multiply_adds,
    )
    sinks = open_sinks(config, run.path, progress.step) if metrics is not None else None
    return Recorder(task, run, metrics, config.logging, scope, sinks, baselines)


def open_metrics(
    task: AnyTask,
    resolved: Resolved,
    store: CheckpointStore,
    progress: Progress,
    total_steps: int,
    baselines: KnownBaselines,
) -> Metrics:
    """Rank 0's metrics, with the counters where the run left them."""
    metrics = Metrics(table_of((*task.numbers, *task.known), task.measured, task.metrics))
    named = {name: str(value) for name, value in versions().items() if name != "commit"}
    run = Path(task.config.run).name
    metrics.describe(
        **named, kind=task.kind, zero_stage=str(resolved.stage), precision=resolved.precision, run=run
    )
    metrics.add("beit_train_steps", progress.step)
    metrics.add("beit_train_steps_skipped", progress.counters["skipped"])
    metrics.add("beit_train_samples", progress.samples)
    metrics.add("beit_checkpoint_damaged", store.passed_over)
    for number in task.known:
        if number.kind == "counter" and number.metric is not None:
            metrics.add(number.metric, progress.counters[number.name])
    for result in ("ok", "failed"):  # the first failure must be an increase, not a new series
        metrics.add("beit_checkpoint_saves", 0, result=result)
    metrics.set(
        {
            "beit_train_attempt": store.attempt,
            "beit_train_first_step": progress.step,
            "beit_train_start_timestamp_seconds": time.time(),
            "beit_train_target_steps": total_steps,
            "beit_train_world_size": resolved.ranks,
            "beit_train_stall_limit_seconds": task.config.watchdog.stall_seconds,
        }
    )
    saved = task.config.checkpoint
    if saved.every_minutes is not None:
        metrics.set({"beit_checkpoint_every_seconds": 60 * saved.every_minutes})
    if saved.every_steps is not None:
        metrics.set({"beit_checkpoint_every_steps": saved.every_steps})
    for data, numbers in (("training", baselines.training), ("held_out", baselines.held_out)):
        for name, known in numbers.items():
            for baseline in known:
                metrics.set_labelled(
                    "beit_train_baseline", baseline.value, number=name, baseline=baseline.name, data=data
                )
    task.begun(metrics)
    return metrics
