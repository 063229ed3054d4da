"""What a rank's model, optimizer and checkpoints take, computed from shapes: nothing is allocated."""

from __future__ import annotations

import math
from typing import Any

import torch

from beit_dist.checkpoints.layout import checkpoint_bytes
from beit_dist.engine.optimizers.table import kept_values
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Task
from beit_dist.models.buffers import kept_buffers


def parameter_shapes(task: Task[Any, Any, Any]) -> dict[str, list[int]]:
    """Shape of each of the model's parameters, by name and in their order."""
    with torch.device("meta"):
        model = task.network()
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def state_shapes(task: Task[Any, Any, Any]) -> dict[str, list[int]]:
    """The same of its parameters and the buffers that checkpoints hold."""
    with torch.device("meta"):
        model = task.network()
    held = {**dict(model.named_parameters()), **kept_buffers(model)}
    return {name: list(tensor.shape) for name, tensor in held.items()}


def count_parameters(task: Task[Any, Any, Any]) -> int:
    """Trainable parameters."""
    return sum(map(math.prod, parameter_shapes(task).values()))


def kept_by_optimizer(task: Task[Any, Any, Any]) -> dict[str, int]:
    """Number of fp32 values that the optimizer keeps, by role."""
    return kept_values(task.config.optimizer.name, parameter_shapes(task))


def state_bytes(resolved: Resolved, parameters: int, kept: int) -> dict[str, int]:
    """Bytes of a rank's weights, gradients and optimizer state at its stage and precision.

    Args:
        parameters: values of the weights.
        kept: values that the optimizer keeps of them.
    """
    low = 4 if resolved.precision == "fp32" else 2
    gradients = low if resolved.accumulation_type == resolved.precision else 4
    if resolved.stage == 1 and resolved.precision == "bf16" and resolved.accumulation_type == "fp32":
        gradients += low  # DeepSpeed's BF16_Optimizer keeps the fp32 sums of all parameters beside the bf16 ones
    masters = 0 if resolved.optimizer_is_bare else parameters  # there the weights are their own
    return {
        "weights": low * parameters // (resolved.ranks if resolved.stage >= 3 else 1),
        "gradients": gradients * parameters // (resolved.ranks if resolved.stage >= 2 else 1),
        "optimizer": 4 * (masters + kept) // (resolved.ranks if resolved.stage >= 1 else 1),
    }


def training_bytes(task: Task[Any, Any, Any], resolved: Resolved) -> dict[str, int]:
    """Bytes of a rank's weights, gradients, optimizer state and, if there are any, average and copies."""
    parameters = count_parameters(task)
    parts = state_bytes(resolved, parameters, sum(kept_by_optimizer(task).values()))
    if task.config.ema.decay is not None:
        parts["average"] = 4 * parameters // resolved.ranks
    if task.copies:
        parts["copies"] = 4 * parameters * task.copies
    return parts


def size_of_checkpoint(task: Task[Any, Any, Any]) -> int:
    """Bytes of a checkpoint's tensors."""
    kept = sum(kept_by_optimizer(task).values())
    return checkpoint_bytes(count_parameters(task), kept, task.config.ema.decay is not None)


def in_words(number: float) -> str:
    """A size with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
