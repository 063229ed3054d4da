"""The optimizers by name, and what the rest of the engine asks of the one that was chosen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.engine.optimizers.adamw import ADAMW
from beit_dist.engine.optimizers.kind import Groups, OptimizerKind
from beit_dist.engine.optimizers.lion import LION
from beit_dist.engine.optimizers.muon import MUON
from beit_dist.errors import ConfigError

OPTIMIZERS: dict[str, OptimizerKind] = {"adamw": ADAMW, "lion": LION, "muon": MUON}

_EVERYONES = {
    *("name", "lr", "min_lr", "weight_decay", "clip_grad"),
    *("warmup_epochs", "warmup_steps", "warmup_share", "lr_steps", "decay"),
}
"""Fields of ``OptimizerConfig`` that no optimizer reads itself: groups, schedule and guard do it for all."""


def kind_named(name: str) -> OptimizerKind:
    """The optimizer of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in OPTIMIZERS:
        *others, last = OPTIMIZERS
        close = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1, cutoff=0.5)
        way_out = f"Did you mean {close[0]}?" if close else ""
        raise ConfigError("optimizer.name", name, f"{', '.join(others)} or {last}", way_out)
    return OPTIMIZERS[name]


def kind_of(optimizer: torch.optim.Optimizer) -> OptimizerKind:
    """The kind that an optimizer, as :func:`build_optimizer` returns it, is of."""
    for kind in OPTIMIZERS.values():
        if kind.cls is type(optimizer):
            return kind
    raise ValueError(f"OPTIMIZERS has no {type(optimizer).__name__}")


def check_optimizer(settings: OptimizerConfig, stage: int, precision: str) -> None:
    """Refuse an optimizer that does not exist or does not work here; nothing has to have been built.

    Args:
        stage: the ZeRO stage.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto`` while it is not settled.

    Raises:
        ConfigError: it cannot be used.
    """
    kind_named(settings.name).check(stage, precision)


def check_model(settings: OptimizerConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse an optimizer that is for other models; before the ranks join.

    Args:
        shapes: of the model's parameters, by name.

    Raises:
        ConfigError: the model has no parameters of the sort that the optimizer is for.
    """
    kind_named(settings.name).check_shapes(shapes)


def build_optimizer(groups: Groups, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The chosen optimizer over ``groups`` of a model's parameters.

    The learning rate starts at 0: the schedule sets it before each step, and wrappers that step once on zero
    gradients to create their state must not decay the weights.
    """
    return kind_named(settings.name).build(groups, settings)


def kept_values(name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Number of fp32 values that the optimizer keeps, by role, of parameters of these names and shapes."""
    kind = kind_named(name)
    values: dict[str, int] = {}
    for parameter, shape in shapes.items():
        for role in kind.kept(parameter, shape).roles:
            values[role] = values.get(role, 0) + torch.Size(shape).numel()
    return values


def ignored_settings(settings: OptimizerConfig) -> list[str]:
    """Settings that a recipe gives and its optimizer does not use."""
    return sorted(settings.model_fields_set - _EVERYONES - kind_named(settings.name).uses)
