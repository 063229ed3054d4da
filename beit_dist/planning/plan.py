"""The plan of a run: for each ZeRO stage what it needs and how long a step takes, and which one to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beit_dist.config.model import BackboneConfig
from beit_dist.engine.precision import WORTH_IT
from beit_dist.engine.resolve import AUTO, Resolved, batch_arithmetic, resolve
from beit_dist.engine.schedule import steps_of
from beit_dist.errors import ConfigError
from beit_dist.planning.communication import Exchange, exchanges
from beit_dist.planning.compute import Compute, compute, update_seconds
from beit_dist.planning.devices import Device, Figure
from beit_dist.planning.efficiency import efficiency
from beit_dist.planning.memory import (
    AnyTask,
    Memory,
    checkpoint_size,
    largest_fitting,
    memory,
    multiply_adds_of,
    parameters_of,
    with_rows,
)
from beit_dist.planning.storage import Checkpoint, Reading, checkpoint, reading, view_bytes

ORDER = (1, 0, 2, 3)
"""In which stages are preferred: 1 is right for all shipped sizes (docs/recipes.md)."""
_FASTER = 1.1
"""How many times as fast another stage, or recomputing, must be on paper: their overlap was not measured."""


@dataclass(frozen=True)
class Question:
    """What is asked for besides the recipe."""

    gpus: int
    per_node: int
    device: Device
    samples: int | None = None
    """Of an epoch."""
    views: int = 1
    """Of each sample."""
    store: Figure | None = None
    """Bytes a second of the store; None for no limit."""
    mfu: float | None = None
    price: float | None = None
    """Of a GPU for an hour."""

    @property
    def neighbours(self) -> int:
        """Ranks of a node."""
        return min(self.per_node, self.gpus)


@dataclass(frozen=True)
class Choice:
    """A way to run: stage, micro-batch, recomputing or not."""

    resolved: Resolved
    recompute: bool
    memory: Memory
    fits: bool
    mfu: Figure
    micro: Compute
    update: float
    """Seconds of a step's update that no MFU includes."""
    exchanges: tuple[Exchange, ...]
    communication: float
    """Seconds of a step in which ranks exchange ..."""
    exposed: float
    """... and of these, in which nothing else happens."""
    reading: Reading
    data: float
    """Seconds in which the store can send a step's samples; 0 where its rate is not given."""

    @property
    def compute(self) -> float:
        """Seconds of a step's micro-batches and of its update."""
        return self.resolved.accumulation * self.micro.seconds + self.update

    @property
    def step(self) -> float:
        """Seconds of a step: reading runs beside everything else."""
        return max(self.compute + self.exposed, self.data)

    @property
    def exposed_share(self) -> float:
        """Of what a step takes if data are always there."""
        return self.exposed / (self.compute + self.exposed)


@dataclass(frozen=True)
class Stage:
    """What there is to say of a ZeRO stage."""

    stage: int
    refused: str = ""
    """Why it cannot be; then there is nothing else."""
    choice: Choice | None = None
    """With the recipe's micro-batch and setting of recomputing."""
    most: int | None = None
    """The largest micro-batch that fits, ..."""
    most_recomputed: int | None = None
    """... and with recomputing. None where one sample is too much."""


@dataclass(frozen=True)
class Plan:
    """All of it."""

    question: Question
    parameters: int
    multiply_adds: int
    stages: tuple[Stage, ...]
    best: Choice | None
    """The one to take; None where nothing fits."""
    steps: int | None
    """Of the run; None where the number of samples is not known."""
    checkpoint: Checkpoint | None
    views: int | None
    """Bytes of all views of the data set; None where it is not known."""

    @property
    def saves(self) -> float:
        """Seconds of the run in which it waits for checkpoints."""
        if self.best is None or self.steps is None or self.checkpoint is None or not self.checkpoint.every:
            return 0.0
        return self.steps * self.best.step // self.checkpoint.every * self.checkpoint.stall

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return None if self.best is None or self.steps is None else self.steps * self.best.step + self.saves


def make_plan(task: AnyTask, ds_configs: Mapping[int, Mapping[str, Any]], question: Question) -> Plan:
    """What a run takes on so many GPUs.

    Args:
        task: of the run; it is not started, and no data is looked at.
        ds_configs: DeepSpeed's settings for each stage to be considered.
        question: where and how much.

    Raises:
        ConfigError: the global batch cannot be dealt to the ranks, or recipe and settings conflict at each stage.
    """
    config = task.config
    batch_arithmetic(config.global_batch, config.micro_batch, question.gpus)
    stages = tuple(_stage(task, stage, ds_config, question) for stage, ds_config in ds_configs.items())
    best = _best(task, stages, question)
    steps = None
    if question.samples is not None or config.steps is not None:
        steps = steps_of(config, question.samples or 0)
    saved = None
    if best is not None:
        size = checkpoint_size(task)
        saved = checkpoint(config, size, question.gpus, question.device, _rate(question), best.step)
    stored = view_bytes(config, question.samples) * question.views if question.samples is not None else None
    return Plan(question, parameters_of(task), multiply_adds_of(task), stages, best, steps, saved, stored or None)


def resolved_for(task: AnyTask, ds_config: Mapping[str, Any], ranks: int, device: Device) -> Resolved:
    """Recipe and DeepSpeed's settings for so many ranks, in what the device is fast in where neither says."""
    resolved = resolve(task.config, ds_config, ranks)
    if resolved.precision != AUTO:
        return resolved
    faster = device.peaks["bf16"] / device.peaks["fp32"]
    precision = "bf16" if faster >= WORTH_IT else "fp32"
    return resolved.settled(precision, f"auto: bf16 is {faster:.2g} times as fast as fp32")


def choose(task: AnyTask, resolved: Resolved, question: Question, *, recompute: bool) -> Choice:
    """What a step takes if it is run so."""
    device, config = question.device, task.config
    model = config.model if isinstance(config.model, BackboneConfig) else None
    mfu = efficiency(device, resolved.precision, model.width if model else None, config.compile, question.mfu)
    micro = compute(
        multiply_adds_of(task),
        resolved.micro_batch,
        device,
        resolved.precision,
        mfu,
        depth=model.depth if model else 0,
        compiled=config.compile,
        recompute=recompute,
    )
    parameters = parameters_of(task)
    update = update_seconds(parameters, question.gpus, resolved.stage, device)
    all_of_them = tuple(exchanges(resolved, parameters, cpu=question.device.is_cpu))
    seconds = {each: each.seconds(question.gpus, question.per_node, device) for each in all_of_them}
    hidden = sum(taken for each, taken in seconds.items() if each.hidden)
    exposed = sum(seconds.values()) - min(hidden, resolved.accumulation * micro.backward)
    needed = memory(task, resolved, device, recompute=recompute)
    read = reading(config, question.gpus, question.neighbours, 1.0)
    rate = _rate(question)
    data = config.global_batch * read.store / rate if rate else 0.0
    step = max(resolved.accumulation * micro.seconds + update + exposed, data)
    return Choice(
        resolved,
        recompute,
        needed,
        needed.total <= device.usable,
        mfu,
        micro,
        update,
        all_of_them,
        sum(seconds.values()),
        exposed,
        reading(config, question.gpus, question.neighbours, config.global_batch / step),
        data,
    )


def _rate(question: Question) -> float | None:
    return None if question.store is None else question.store.value


def _stage(task: AnyTask, stage: int, ds_config: Mapping[str, Any], question: Question) -> Stage:
    try:
        resolved = resolved_for(task, ds_config, question.gpus, question.device)
    except ConfigError as error:
        return Stage(stage, refused=str(error))
    recompute = bool(getattr(task.config, "activation_checkpointing", False))
    most = task.config.micro_batch
    return Stage(
        stage,
        choice=choose(task, resolved, question, recompute=recompute),
        most=largest_fitting(task, resolved, question.device, False, most),
        most_recomputed=largest_fitting(task, resolved, question.device, True, most),
    )


def _best(task: AnyTask, stages: tuple[Stage, ...], question: Question) -> Choice | None:
    """The first of ``ORDER`` that fits, up to the recipe's micro-batch, unless a later one is clearly faster."""
    can_recompute = hasattr(task.config, "activation_checkpointing")
    found: list[Choice] = []
    for stage in sorted(stages, key=lambda each: ORDER.index(each.stage)):
        for rows, recompute in ((stage.most, False), (stage.most_recomputed if can_recompute else None, True)):
            if rows is not None and stage.choice is not None:
                resolved = with_rows(stage.choice.resolved, rows)
                found.append(choose(task, resolved, question, recompute=recompute))
    best: Choice | None = None
    for each in found:
        if best is None or each.step * _FASTER < best.step:
            best = each
    return best


def sweep(
    task: AnyTask, ds_configs: Mapping[int, Mapping[str, Any]], question: Question, gpus: Sequence[int]
) -> list[tuple[int, Plan | str]]:
    """The plan for each number of GPUs, or why there is none."""
    found: list[tuple[int, Plan | str]] = []
    for number in gpus:
        try:
            found.append((number, make_plan(task, ds_configs, replace(question, gpus=number))))
        except ConfigError as error:
            found.append((number, str(error)))
    return found
