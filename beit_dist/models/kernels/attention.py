"""Attention with a trained bias by kernels of our own, forward and backward, as operations that torch knows.

They read queries, keys and values where the projection left them and write the output as the next projection reads
it; their gradient is one tensor, as the projection's backward reads it: no permutation, no concatenation. The
gradient of the bias is summed over the batch in fp32, in an order that is always the same.

What it should take, counted for a layer of BEiT-B at a batch of 256 in bf16 (B·H = 3,072, N = 197, D = 64) on an
H100; nothing of it was measured:

- Memory, each tensor once: qkv 232 MB, output 77 MB. Forward moves 310 MB; backward 620 MB, and as much again as
  keys, values and the bias have kernels of their own: 0.46 ms at 3.35 TB/s.
- L2 cache: programs of 128 queries read all keys, values and the bias of their rows, those of 128 keys read all
  queries: 3.8 GB in all, 0.7 ms at 5.5 TB/s. This is the limit, and why tiles are of 128: with 64 it is 5.2 GB.
- Products: 15.3 GFLOP each, 2 forward and 9 backward (three kernels compute the logits and their gradients), and
  half as much again for the tiles: 0.25 ms at 989 TFLOP/s.
- Exponentials: 4 of each of 119 million logits, and half as much again: 0.2 ms at 16 a cycle and multiprocessor.

One kernel for queries and bias together would save two products and one exponential. Its sums, 64 rows of 256 fp32
values, fill the registers: Triton's compiler moved 300 to 900 bytes of each thread to memory in the forms tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from beit_dist.models.kernels import programs
from beit_dist.models.kernels.tiles import Tile, tiles_of

ALIGNMENT = 16
"""Elements at whose multiples rows of the bias begin: then it is read 16 bytes at a time."""
MOST_WIDTH = 128
"""Of a head."""
_PROGRAMS = 512
"""The batch is cut into chunks that make about so many programs: four for each multiprocessor of an H100. A
constant, so that the order of sums does not depend on the device."""

_stages: dict[tuple[Any, ...], int] = {}


def fused_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of queries, keys and values (B, N, 3, H, D) to (B, N, C), in the place of the model's ``attend``.

    ``bias`` (1, H, N, N), of any floating-point type, is added to the scaled logits. Its gradient is that of the
    whole batch, in fp32 until it is rounded to the bias's type.
    """
    mixed: Tensor = _attention(qkv, bias)[0]
    return mixed


@torch.library.custom_op(
    "beit_dist::attention", mutates_args=(), schema="(Tensor qkv, Tensor? bias) -> (Tensor, Tensor)"
)
def _attention(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (B, H, N), in units of log 2."""
    qkv, (batch, length, _, heads, width) = _last_dense(qkv), qkv.shape
    if bias is not None:
        bias = _aligned(bias)
    out, lse = _outputs(qkv)
    wide = max(16, triton.next_power_of_2(width))
    tile = tiles_of(wide, qkv.element_size()).forward
    _launch(
        programs.forward,
        (batch * heads * triton.cdiv(length, tile.rows),),
        tile,
        *(qkv, qkv if bias is None else bias, out, lse),
        *_steps(qkv, bias),
        *(length, heads, _edge(length), width**-0.5),
        D=width,
        WIDE=wide,
        BIASED=bias is not None,
    )
    return out, lse


@_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(qkv)


@torch.library.custom_op(
    "beit_dist::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, bool trained) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``qkv`` and of the bias, which is empty unless it is ``trained``."""
    qkv, grad, (batch, length, _, heads, width) = _last_dense(qkv), grad.contiguous(), qkv.shape
    if bias is not None:
        bias = _aligned(bias)
    bias_or_any, edge = qkv if bias is None else bias, _edge(length)
    wide = max(16, triton.next_power_of_2(width))
    tiles = tiles_of(wide, qkv.element_size())
    delta, grad_qkv = torch.empty_like(lse), qkv.new_empty(qkv.shape)
    steps, sizes = _steps(qkv, bias), (length, heads, edge, width**-0.5)
    constants = {"D": width, "WIDE": wide}

    tile = tiles.queries
    _launch(
        programs.query_gradients,
        (batch * heads * triton.cdiv(length, tile.rows),),
        tile,
        *(qkv, bias_or_any, out, grad, lse, delta, grad_qkv),
        *steps,
        *sizes,
        **constants,
        BIASED=bias is not None,
    )
    tile = tiles.keys
    _launch(
        programs.key_gradients,
        (batch * heads * triton.cdiv(length, tile.columns),),
        tile,
        *(qkv, bias_or_any, grad, lse, delta, grad_qkv),
        *steps,
        *sizes,
        **constants,
        BIASED=bias is not None,
    )
    if not trained or bias is None:
        return grad_qkv, qkv.new_empty(0)
    tile = tiles.bias
    count = triton.cdiv(length, tile.rows) * triton.cdiv(length, tile.columns)
    chunk = _chunk(batch, count * heads)
    chunks = triton.cdiv(batch, chunk)
    sums = lse.new_empty((chunks, heads, length, edge))
    _launch(
        programs.bias_gradients,
        (count, heads, chunks),
        tile,
        *(qkv, bias, grad, lse, delta, sums),
        *steps,
        *(batch, *sizes, chunk),
        **constants,
    )
    return grad_qkv, sums.sum(0)[:, :, :length].to(bias.dtype).unsqueeze(0).contiguous()


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    like = qkv.new_empty(0) if bias is None or not trained else bias.new_empty(bias.shape)
    return qkv.new_empty(qkv.shape), like


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or zeros are made for the log-sum-exp, which is given to nobody
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    qkv, bias, out, lse = ctx.saved_tensors
    trained = bias is not None and ctx.needs_input_grad[1]
    grad_qkv, grad_bias = _backward(grad, qkv, bias, out, lse, trained)
    return grad_qkv, grad_bias if trained else None


_attention.register_autograd(_differentiate, setup_context=_keep)


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, length, heads * width)
    return out, qkv.new_empty((batch, heads, length), dtype=torch.float32)


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with as many stages as the device's shared memory holds."""
    shape = {**constants, "ROWS": tile.rows, "COLUMNS": tile.columns}
    known = (kernel, tile, arguments[0].dtype, *constants.values())
    for stages in range(_stages.get(known, tile.stages), 0, -1):
        try:
            kernel[grid](*arguments, **shape, num_warps=tile.warps, num_stages=stages)
        except triton.runtime.OutOfResources:
            if stages == 1:
                raise
        else:
            _stages[known] = stages
            return


def _steps(qkv: Tensor, bias: Tensor | None) -> Sequence[int]:
    """Strides: of samples, tokens, parts and heads, then of the bias's heads and rows."""
    return (*qkv.stride()[:4], *((0, 0) if bias is None else bias.stride()[1:3]))


def _chunk(batch: int, programs_each: int) -> int:
    """Samples that one program sums the bias's gradient over."""
    chunks = min(batch, -(-_PROGRAMS // programs_each))
    return -(-batch // chunks)


def _edge(length: int) -> int:
    return (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _last_dense(qkv: Tensor) -> Tensor:
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def _aligned(bias: Tensor) -> Tensor:
    """A bias (1, H, N, N) whose rows begin at multiples of 16, with room behind each: itself, or a copy.

    The model's own bias lies so (:func:`beit_dist.models.positions.position_bias`): it is laid out once a step.
    """
    _, heads, length, _ = bias.shape
    _, head_step, row_step, step = bias.stride()
    steps_fit = step == 1 and not any(n % ALIGNMENT for n in (head_step, row_step, bias.storage_offset()))
    end = bias.storage_offset() + (heads - 1) * head_step + (length - 1) * row_step + _edge(length)
    if steps_fit and end * bias.element_size() <= bias.untyped_storage().nbytes():
        return bias
    return F.pad(bias, (0, _edge(length) - length))[..., :length]
