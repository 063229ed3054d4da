"""Multi-head self-attention with a trained bias of its logits.

Shapes: B samples, N tokens, C width, H heads, D = C/H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_dist.models.attention_on_cpu import AttentionOnCPU
from beit_dist.models.positions import position_bias


class Attention(nn.Module):
    """Multi-head self-attention with a bias for queries and values, but none for keys (softmax cancels it).

    Args:
        width: C.
        heads: H.
        table_rows: of a relative position table of its own; None where it has none.
    """

    def __init__(self, width: int, heads: int, table_rows: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Callable[[Tensor, Tensor | None], Tensor] = attend  # or a kernel that takes its place
        self.qkv = _Projection(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = None
        if table_rows is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows, heads))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, C) to (B, N, C).

        ``bias`` (1, H, N, N) is added to the logits. With a table of its own it is the index, int64 (N, N), into
        that instead.
        """
        qkv, bias = self._projected(x, bias)
        mixed: Tensor = self.proj(self.attend(qkv, bias))
        return mixed

    def shares(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """How much each token attends to each, (B, H, N, N): rows are queries and sum to 1; fp32.

        Arguments are those of :meth:`forward`.
        """
        return shares(*self._projected(x, bias))

    def _projected(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values (B, N, 3, H, D), and what is added to the logits."""
        batch, length, width = x.shape
        if self.relative_position_bias_table is not None and bias is not None:
            bias = position_bias(self.relative_position_bias_table, bias)
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return self.qkv(x, qkv_bias).view(batch, length, 3, self.heads, width // self.heads), bias


def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of queries, keys and values (B, N, 3, H, D) as the projection left them, to (B, N, C).

    ``bias`` (1, H, N, N) is added to the scaled logits. Accelerators run PyTorch's fused kernels, CPUs our own
    function, or plain operations where blocks are compiled.
    """
    if bias is not None:
        bias = bias.to(qkv.dtype)
    if qkv.device.type != "cpu":
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    if torch.compiler.is_compiling():
        return spelt_out(qkv, bias)
    mixed: Tensor = AttentionOnCPU.apply(qkv, bias)  # type: ignore[no-untyped-call]
    return mixed


def spelt_out(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """What :func:`attend` computes, as tensor operations."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
    logits = torch.matmul(query * query.shape[-1] ** -0.5, key.mT)
    if bias is not None:
        logits = logits + bias
    return torch.matmul(logits.softmax(-1), value).transpose(1, 2).flatten(2)


def shares(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """By what values are weighted in :func:`attend`: fp32 (B, H, N, N)."""
    query, key = qkv[:, :, :2].permute(2, 0, 3, 1, 4).float().unbind()
    logits = torch.matmul(query * query.shape[-1] ** -0.5, key.mT)
    if bias is not None:
        logits = logits + bias.float()
    return logits.softmax(-1)


class _Projection(nn.Linear):
    """A linear layer whose bias belongs to its caller: ``forward`` stays the one place that reads the weight,
    which ZeRO-3 gathers when this module runs."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)
