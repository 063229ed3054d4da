"""What a device's memory holds in training: the engine's own count, and what is beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from beit_dist.config.model import BackboneConfig
from beit_dist.engine.memory import count_parameters, size_of_checkpoint, training_bytes
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Task
from beit_dist.planning.communication import sums_beside
from beit_dist.planning.devices import Device

AnyTask = Task[Any, Any, Any]
_BUCKET = 500_000_000
PROCESS = 0.6 * 2**30
"""Python, PyTorch and DeepSpeed in a process on a CPU. Assumed; a GPU holds none of it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank's device by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def memory(task: AnyTask, resolved: Resolved, device: Device, *, recompute: bool) -> Memory:
    """What a rank's device holds at the end of a forward pass.

    Args:
        task: of the run.
        resolved: stage, precision and micro-batch.
        device: of each rank.
        recompute: ``activation_checkpointing``, in place of the recipe's.
    """
    of_one = _activations_of_one(task, resolved.precision, recompute)
    parts = {
        **_state(task, resolved.ranks, resolved.stage, resolved.precision, resolved.accumulation_type),
        **{name: resolved.micro_batch * size for name, size in of_one.items()},
    }
    if attention := attention_bytes(task, resolved, device, recompute):
        parts["attention"] = attention
    if buckets := bucket_bytes(resolved, parts["weights"]):
        parts["buckets"] = buckets
    if device.is_cpu:  # there what a GPU's host holds is in the same memory
        parts |= {"copy": checkpoint_size(task) // resolved.ranks, "process": int(PROCESS)}
    return Memory(parts)


# Counting builds the model on the meta device. A plan asks for the same counts many times.


@lru_cache(maxsize=64)
def parameters_of(task: AnyTask) -> int:
    """See :func:`beit_dist.engine.memory.count_parameters`."""
    return count_parameters(task)


@lru_cache(maxsize=64)
def multiply_adds_of(task: AnyTask) -> int:
    """See :attr:`beit_dist.engine.task.Task.multiply_adds`."""
    return task.multiply_adds


@lru_cache(maxsize=64)
def checkpoint_size(task: AnyTask) -> int:
    """See :func:`beit_dist.engine.memory.size_of_checkpoint`."""
    return size_of_checkpoint(task)


@lru_cache(maxsize=1024)
def _state(task: AnyTask, ranks: int, stage: int, precision: str, accumulation_type: str) -> Mapping[str, int]:
    return training_bytes(task, Resolved(ranks, 1, 1, stage, precision, accumulation_type, {}))


@lru_cache(maxsize=256)
def _activations_of_one(task: AnyTask, precision: str, recompute: bool) -> Mapping[str, int]:
    """What the task says that a sample keeps, with or without recomputing; a micro-batch keeps as much of each."""
    resolved, before = Resolved(1, 1, 1, 0, precision, precision, {}), task.config
    if not hasattr(before, "activation_checkpointing"):
        return task.activation_parts(resolved)
    task.config = before.model_copy(update={"activation_checkpointing": recompute})
    try:
        return task.activation_parts(resolved)
    finally:
        task.config = before


def attention_bytes(task: AnyTask, resolved: Resolved, device: Device, recompute: bool) -> int:
    """Matrices of all queries and keys that are really made, besides the rows that a block keeps.

    On a GPU the fused kernel makes none but the gradient of a trained bias, which it writes for every image before
    it is summed: for one block at a time, and twice, for a copy that the sum may make (assumed). On a CPU
    attention is spelt out: each block keeps the softmax for its backward pass, and one block at a time has
    logits and their gradient beside it.
    """
    model = task.config.model
    if not isinstance(model, BackboneConfig):
        return 0
    size = 4 if resolved.precision == "fp32" else 2
    matrix = resolved.micro_batch * model.heads * (1 + model.patches) ** 2 * size
    if device.is_cpu:
        return ((1 if recompute else model.depth) + 2) * matrix
    return 2 * matrix if model.relative_positions else 0


def bucket_bytes(resolved: Resolved, weights: int) -> int:
    """Buffers in which gradients are reduced while the backward pass runs: one, or two where they overlap."""
    zero = resolved.deepspeed.get("zero_optimization", {})
    if resolved.ranks == 1 or resolved.stage == 0 or sums_beside(resolved):
        return 0
    size = 4 if resolved.precision == "fp32" else 2
    whole = weights * (resolved.ranks if resolved.stage == 3 else 1)
    bucket = min(size * zero.get("reduce_bucket_size", _BUCKET), whole)
    return int(bucket * (2 if zero.get("overlap_comm", resolved.stage == 3) else 1))


def with_rows(resolved: Resolved, rows: int) -> Resolved:
    """The same with another micro-batch, a divisor of the rank's share."""
    return replace(resolved, micro_batch=rows, accumulation=resolved.rank_batch // rows)


def micro_batches(resolved: Resolved) -> list[int]:
    """Divisors of the rank's share, from large to small."""
    share = resolved.rank_batch
    return [rows for rows in range(share, 0, -1) if share % rows == 0]


def largest_fitting(task: AnyTask, resolved: Resolved, device: Device, recompute: bool, most: int) -> int | None:
    """The largest micro-batch up to ``most`` that fits; None where even one sample is too much."""
    for rows in micro_batches(resolved):
        if rows <= most:
            needed = memory(task, with_rows(resolved, rows), device, recompute=recompute)
            if needed.total <= device.usable:
                return rows
    return None
