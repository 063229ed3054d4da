"""Attention with a trained bias on a CPU: a few samples at a time, so that their logits stay in a cache.

PyTorch's own function computes it in fp32 where a bias needs a gradient. Spelt out in tensor operations, it passes
over the logits of the whole batch six times each way, and copies queries, keys, values and their gradients. Here
products read and write them where they lie.

Shapes: B samples, N tokens, H heads, D values of a head; S samples worked on at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_LOGITS_AT_A_TIME = 1 << 20
"""Bytes, about half of a core's L2 cache; measured: twice or half as much makes no difference."""


class AttentionOnCPU(torch.autograd.Function):
    """See :func:`beit_dist.models.attention.attend`; ``bias`` has the dtype of ``qkv``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, 3, H, D) and (1, H, N, N) to (B, N, H · D)."""
        batch, length, _, heads, size = qkv.shape
        mixed = qkv.new_empty(batch, length, heads, size)
        keep = any(ctx.needs_input_grad)
        shares = qkv.new_empty(batch if keep else 0, heads, length, length)
        for part, scratch in _parts(qkv):
            query, key, value = (_by_head(one) for one in qkv[part].unbind(2))
            added = scratch if bias is None else bias.expand(len(scratch) // heads, -1, -1, -1).flatten(0, 1)
            # With beta=0 what is in `scratch` is not read.
            torch.baddbmm(added, query, key.mT, beta=0 if bias is None else 1, alpha=size**-0.5, out=scratch)
            weights = torch.softmax(scratch, -1, out=shares[part].flatten(0, 1) if keep else None)
            _product(weights, value, mixed[part])
        ctx.save_for_backward(qkv, shares)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return mixed.flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``qkv`` and ``bias``. That of ``bias`` is summed over the samples in fp32 at least."""
        qkv, shares = ctx.saved_tensors
        heads, length = shares.shape[1:3]
        of_qkv, of_mixed = torch.empty_like(qkv), gradients[0].reshape(*qkv.shape[:2], heads, -1)
        of_bias = None
        if ctx.bias_dtype is not None:
            wide = torch.promote_types(ctx.bias_dtype, torch.float32)
            of_bias = torch.zeros(1, heads, length, length, dtype=wide)
        scale = qkv.shape[-1] ** -0.5
        for part, scratch in _parts(qkv):
            query, key, value = (_by_head(one) for one in qkv[part].unbind(2))
            of_query, of_key, of_value = of_qkv[part].unbind(2)
            weights, arriving = shares[part].flatten(0, 1), _by_head(of_mixed[part])
            torch.bmm(arriving, value.mT, out=scratch)
            of_logits = torch._softmax_backward_data(scratch, weights, -1, weights.dtype)
            if of_bias is not None:
                for one in of_logits.view(-1, heads, length, length):
                    of_bias += one
            _product(of_logits, key, of_query, scale)
            _product(of_logits.mT, query, of_key, scale)
            _product(weights.mT, arriving, of_value)
        return of_qkv, None if of_bias is None else of_bias.to(ctx.bias_dtype)


def _parts(qkv: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Samples to work on at a time, each with memory for their logits (S · H, N, N), the same for all."""
    batch, length, _, heads, _ = qkv.shape
    at_a_time = min(batch, max(1, _LOGITS_AT_A_TIME // (heads * length * length * qkv.element_size())))
    memory = qkv.new_empty(at_a_time * heads, length, length)
    for first in range(0, batch, at_a_time):
        last = min(first + at_a_time, batch)
        yield slice(first, last), memory[: (last - first) * heads]


def _by_head(tokens: Tensor) -> Tensor:
    """(S, N, H, D) as matrices (S · H, N, D): of one sample where they lie, of several copied."""
    return tokens.transpose(1, 2).flatten(0, 1)


def _product(left: Tensor, right: Tensor, into: Tensor, scale: float = 1.0) -> None:
    """``left @ right · scale`` of matrices (S · H, N, N) and (S · H, N, D), put into tokens (S, N, H, D)."""
    samples, _, heads, _ = into.shape
    if samples == 1:
        target = into[0].transpose(0, 1)
        torch.baddbmm(target, left, right, beta=0, alpha=scale, out=target)
    else:
        found = torch.bmm(left, right).mul_(scale)
        into.copy_(found.view(samples, heads, *found.shape[1:]).transpose(1, 2))
