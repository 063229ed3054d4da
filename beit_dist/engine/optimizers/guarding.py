"""Clipping and the check for non-finite gradients, for any optimizer that DeepSpeed leaves as it is."""

from __future__ import annotations

from typing import Any

import torch


def guard_updates(optimizer: torch.optim.Optimizer, clip_grad: float) -> None:
    """Have an optimizer clip by the global norm, and leave everything alone when that norm is not finite.

    DeepSpeed's wrapped optimizers do both themselves; without a wrapper (stage 0 in fp32) it does neither check
    nor report. The engine reads ``overflow`` and ``_global_grad_norm`` after each step. Gradients are already
    averaged over the ranks here, so all ranks see the same norm.

    Args:
        optimizer: any.
        clip_grad: largest global L2 norm of the gradient; 0 never clips.
    """
    guarded: Any = optimizer
    update = guarded.step
    guarded.overflow, guarded._global_grad_norm = False, None

    @torch.no_grad()
    def step() -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        guarded._global_grad_norm = norm
        guarded.overflow = not bool(torch.isfinite(norm))
        if guarded.overflow:
            return
        if clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        update()

    guarded.step = step
