"""AdamW (arXiv 1711.05101), torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.engine.optimizers.kind import Groups, Kept, OptimizerKind


def build_adamw(groups: Groups, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``groups``, by torch's fused kernel on every device."""
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def kept_by_adamw(name: str, shape: Sequence[int]) -> Kept:
    """Two moments of every parameter."""
    return Kept(("exp_avg", "exp_avg_sq"), counts=True)


ADAMW = OptimizerKind(
    cls=torch.optim.AdamW,
    build=build_adamw,
    kept=kept_by_adamw,
    uses=frozenset({"betas", "eps"}),
)
