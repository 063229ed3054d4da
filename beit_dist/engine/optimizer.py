"""AdamW with the original's decay groups, and a guard for optimizers that DeepSpeed leaves as they are."""

from __future__ import annotations

from typing import Any

import torch

from beit_dist.config import OptimizerConfig


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


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over ``groups`` (each with ``name``, ``params``, ``weight_decay``).

    Args:
        groups: parameter groups of the model.
        settings: betas and eps.
        fused: use torch's fused kernel.

    The learning rate starts at 0: the schedule sets it before each step, and wrappers that step once on zero
    gradients to create their state must not decay the weights.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def layer_scales(depth: int, decay: float) -> tuple[float, ...]:
    """Factors of the learning rate by layer, for fine-tuning (unilm ``LayerDecayValueAssigner``).

    Layer 0 is what comes before the blocks, 1 to ``depth`` are the blocks, and ``depth + 1`` is the rest, which
    has the whole rate: ``decay`` to the power of ``depth + 1 − layer``. The original's ``decay`` is 0.65 for base
    and 0.75 for large from pre-trained weights, and 0.85 and 0.9 from weights that were fine-tuned before.
    """
    return tuple(decay ** (depth + 1 - layer) for layer in range(depth + 2))


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter in :func:`layer_scales` (unilm ``get_num_layer_for_vit``).

    A shared relative position bias belongs to the last, with the final norm and the heads.
    """
    first, _, rest = name.partition(".")
    if first in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest.partition(".")[0]) + 1 if first == "blocks" else depth + 1
