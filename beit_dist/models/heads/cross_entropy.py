"""Cross-entropy over a large vocabulary, and how well it was guessed, in one pass over the logits.

R rows, V classes. The logits are read in chunks of rows, each worked on while it is in a cache, and no more than a
chunk is ever held in fp32. The gradient is found in the same pass, from the exponentials of the loss. It is kept,
the logits are not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_CHUNK = 1 << 20
"""Bytes of a chunk in fp32. On a CPU half a core's L2 cache: twice or half as much makes no difference."""
_CHUNK = 1 << 28
"""On an accelerator: as large as fits beside a model, since every chunk starts kernels."""
_FP16_GAIN = 1024.0
"""What the gradient is multiplied by until the backward pass if it is fp16, whose smallest normal number, 6e-5,
is half of the 1/8192 that an untrained model gives each token. A power of two: exact."""


def cross_entropy_and_ranks(logits: Tensor, targets: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows whose target is not negative.

    Args:
        logits: (R, V) in any precision; the only one with a gradient.
        targets: (R,) int64 in [0, V); negative ones count for nothing.
        few: see the last sum.

    Returns:
        fp32 scalars: the cross-entropy in nats; the rows whose target has the largest logit; those in which fewer
        than ``few`` logits are larger than the target's. Rows with a logit that is not a number count in neither.
    """
    if torch.compiler.is_compiling():  # which makes one pass of plain operations by itself
        return in_operations(logits, targets, few)
    loss, correct, among = _CrossEntropy.apply(logits, targets, few)  # type: ignore[no-untyped-call]
    return loss, correct, among


def in_operations(logits: Tensor, targets: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`cross_entropy_and_ranks` computes, as tensor operations on fp32 logits."""
    log_likelihoods = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    own = log_likelihoods.gather(1, targets.clamp(min=0).unsqueeze(1))
    counted = targets >= 0
    loss = -torch.where(counted, own.squeeze(1), 0).sum()
    with torch.no_grad():
        guesses = log_likelihoods.max(dim=-1).indices
        no_larger = (log_likelihoods <= own).sum(-1, dtype=torch.int32)
        correct = (guesses == targets).sum(dtype=torch.float32)
        among = (counted & (no_larger > max(0, logits.shape[1] - few))).sum(dtype=torch.float32)
    return loss, correct, among


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, classes = logits.shape
        sums = torch.zeros(3, dtype=torch.float32, device=logits.device)
        gain = _FP16_GAIN if logits.dtype is torch.float16 else 1.0
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        chunk = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _CHUNK) // (4 * classes))
        in_place = gradient is not None and logits.dtype is torch.float32
        memory = gradient if in_place else logits.new_empty(min(rows, chunk), classes, dtype=torch.float32)
        assert memory is not None  # for the type checker
        for first in range(0, rows, chunk):
            part, wanted = logits[first : first + chunk].float(), targets[first : first + chunk]
            shares = memory[first : first + chunk] if in_place else memory[: len(part)]
            counted = wanted >= 0
            column = wanted.clamp(min=0).unsqueeze(1)
            own = part.gather(1, column)
            largest, guesses = part.max(dim=-1, keepdim=True)  # argmax is three times as slow on the CPU
            # Sums of int32: those of the default, int64, take eight times as long on the CPU.
            no_larger = (part <= own).sum(-1, dtype=torch.int32)
            torch.softmax(part, -1, out=shares)
            # By the largest share, which is 1/V at least: that of the target may be too small for a logarithm.
            losses = (largest - own - shares.gather(1, guesses).log()).squeeze(1)
            sums[0] += torch.where(counted, losses, 0).sum()
            numbers = ~losses.isnan()
            sums[1] += (numbers & (guesses.squeeze(1) == wanted)).sum()
            sums[2] += (numbers & counted & (no_larger > max(0, classes - few))).sum()
            if gradient is not None:
                shares.mul_(counted.unsqueeze(1) * gain).scatter_add_(1, column, counted.unsqueeze(1) * -gain)
                if not in_place:
                    gradient[first : first + chunk] = shares
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.gain = gain
        loss, correct, among = sums.unbind()
        ctx.mark_non_differentiable(correct, among)
        return loss, correct, among

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (gradients[0] / ctx.gain).to(gradient.dtype), None, None
