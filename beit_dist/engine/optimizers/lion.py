"""Lion (arXiv 2302.06675, algorithm 2): steps of one size, along the sign of a momentum.

Ours, because those of others do not fit: DeepSpeed's compiles a kernel on every host, lion-pytorch refuses the
learning rate of 0 that a run begins with, and pytorch-optimizer would be a hundred optimizers for these lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.engine.optimizers.kind import Groups, Kept, OptimizerKind


class Lion(torch.optim.Optimizer):
    """Lion over parameter groups with ``betas``, ``lr`` and a decoupled ``weight_decay``."""

    def __init__(self, groups: Groups, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:  # DeepSpeed steps one group at a time and empties the others
                continue
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self._momentum(parameter) for parameter in parameters]
            (beta1, beta2), lr = group["betas"], group["lr"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        return state["exp_avg"]


def build_lion(groups: Groups, settings: OptimizerConfig) -> Lion:
    """Lion over ``groups``."""
    return Lion(groups, settings.betas)


def kept_by_lion(name: str, shape: Sequence[int]) -> Kept:
    """One moment of every parameter."""
    return Kept(("exp_avg",))


LION = OptimizerKind(
    cls=Lion,
    build=build_lion,
    kept=kept_by_lion,
    uses=frozenset({"betas"}),
)
