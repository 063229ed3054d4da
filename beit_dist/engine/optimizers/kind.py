"""What the engine must know of an optimizer: how it is built, what it keeps, where it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beit_dist.config.optimizer import OptimizerConfig

Groups = list[dict[str, Any]]
"""Parameter groups, each with ``name``, ``params`` as (name, parameter), and ``weight_decay``."""


@dataclass(frozen=True)
class Kept:
    """What an optimizer keeps of a parameter from one update to the next; all zeros before the first."""

    roles: tuple[str, ...]
    """Names in torch's state of tensors of the parameter's shape, in fp32; a checkpoint has them under these."""
    counts: bool = False
    """Whether ``step`` in that state counts the updates."""


def anywhere(stage: int, precision: str) -> None:
    """Works at every ZeRO stage and in every precision."""


def any_model(shapes: Mapping[str, Sequence[int]]) -> None:
    """Works with parameters of any names and shapes."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer, as ``OPTIMIZERS`` has it."""

    cls: type[torch.optim.Optimizer]
    """Of what ``build`` returns, and of nothing else: state is told apart by it."""
    build: Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]
    """With a learning rate of 0, which the schedule sets before each step."""
    kept: Callable[[str, Sequence[int]], Kept]
    """What it keeps of a parameter of this name and shape."""
    uses: frozenset[str]
    """Which fields of ``OptimizerConfig`` it reads, besides those that are every optimizer's."""
    check: Callable[[int, str], None] = anywhere
    """Raises ConfigError where it does not work: takes the ZeRO stage and the precision (maybe ``auto``)."""
    check_shapes: Callable[[Mapping[str, Sequence[int]]], None] = any_model
    """Raises ConfigError where the model is none that it is for."""
