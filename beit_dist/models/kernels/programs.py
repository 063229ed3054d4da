"""Attention with a trained bias, as Triton programs; :mod:`.attention` launches them.

Shapes: B samples, N tokens, H heads, D values of a head (``WIDE`` is the power of two that holds it). Queries,
keys and values lie where the projection left them, (B, N, 3, H, D), and have strides. Whatever else has the shape
(B, N, H, D) or (B, H, N), and all that is written, lies densely.

A program sees a tile of ``ROWS`` queries and ``COLUMNS`` keys. What lies outside is read as zeros, so only the sum
over a row's keys must leave it out. Rows of the bias begin at multiples of 16 elements, and ``edge``, N rounded up
to 16, limits their loads: N itself, where it is odd, would have them done element by element.

Logits are in natural units, so that the bias is added as it is; the exponential is base 2, its factor part of the
same multiplication and addition: ``exp2(logit · LOG2E − lse)``, with ``lse`` in units of log 2.
"""

# Triton compiles these functions: it reads their source and knows none of the types.

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
EXACT: tl.constexpr = tl.constexpr("ieee")
"""fp32 products in fp32; those of bf16 and fp16 are summed in fp32 anyway."""


@triton.jit
def forward(
    qkv, bias, out, lse, sample_step, token_step, part_step, head_step, bias_head_step, bias_row_step,
    N, H, edge, scale,
    D: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The output and each row's log-sum-exp; grid (B · H · tiles of queries).

    Softmax block by block of keys: what was summed is scaled down whenever a larger logit is found.
    """
    each, row = tl.program_id(0) // tl.cdiv(N, ROWS), tl.program_id(0) % tl.cdiv(N, ROWS) * ROWS
    sample, head = each // H, each % H
    queries = qkv + tl.cast(sample, tl.int64) * sample_step + head * head_step
    q = _load(queries, row, token_step, N, D, WIDE, ROWS)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, N, COLUMNS):
        k = _load(queries + part_step, first, token_step, N, D, WIDE, COLUMNS)
        v = _load(queries + 2 * part_step, first, token_step, N, D, WIDE, COLUMNS)
        logits = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
        if BIASED:
            logits += _load_bias(bias + head * bias_head_step, row, first, bias_row_step, N, edge, ROWS, COLUMNS)
        logits = tl.where(tl.arange(0, COLUMNS)[None, :] < N - first, logits, float("-inf"))
        larger = tl.maximum(most, tl.max(logits, 1))
        p = tl.exp2(logits * LOG2E - (larger * LOG2E)[:, None])
        shrink = tl.exp2((most - larger) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision=EXACT)
        most = larger
    mixed = mixed / total[:, None]
    _store(out + tl.cast(sample, tl.int64) * N * H * D + head * D, mixed, row, H * D, N, D, WIDE, ROWS)
    rows = row + tl.arange(0, ROWS)
    tl.store(lse + each * N + rows, most * LOG2E + tl.log2(total), mask=rows < N)


@triton.jit
def query_gradients(
    qkv, bias, out, grad, lse, delta, grad_qkv, sample_step, token_step, part_step, head_step,
    bias_head_step, bias_row_step, N, H, edge, scale,
    D: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and ``delta``, each one's sum of ``out · grad``; grid (B · H · tiles of queries)."""
    each, row = tl.program_id(0) // tl.cdiv(N, ROWS), tl.program_id(0) % tl.cdiv(N, ROWS) * ROWS
    sample, head = each // H, each % H
    rows = row + tl.arange(0, ROWS)
    queries = qkv + tl.cast(sample, tl.int64) * sample_step + head * head_step
    dense = tl.cast(sample, tl.int64) * N * H * D + head * D
    q = _load(queries, row, token_step, N, D, WIDE, ROWS)
    g = _load(grad + dense, row, H * D, N, D, WIDE, ROWS)
    mixed = _load(out + dense, row, H * D, N, D, WIDE, ROWS)
    level = tl.load(lse + each * N + rows, mask=rows < N, other=0.0)
    shift = tl.sum(g.to(tl.float32) * mixed.to(tl.float32), 1)
    tl.store(delta + each * N + rows, shift, mask=rows < N)
    dq = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, N, COLUMNS):
        k = _load(queries + part_step, first, token_step, N, D, WIDE, COLUMNS)
        v = _load(queries + 2 * part_step, first, token_step, N, D, WIDE, COLUMNS)
        logits = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
        if BIASED:
            logits += _load_bias(bias + head * bias_head_step, row, first, bias_row_step, N, edge, ROWS, COLUMNS)
        logits = tl.where(tl.arange(0, COLUMNS)[None, :] < N - first, logits, float("-inf"))
        p = tl.exp2(logits * LOG2E - level[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision=EXACT) - shift[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=EXACT)
    dense = tl.cast(sample, tl.int64) * N * 3 * H * D + head * D
    _store(grad_qkv + dense, dq * scale, row, 3 * H * D, N, D, WIDE, ROWS)


@triton.jit
def bias_gradients(
    qkv, bias, grad, lse, delta, sums, sample_step, token_step, part_step, head_step,
    bias_head_step, bias_row_step, B, N, H, edge, scale, chunk,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the bias, after :func:`query_gradients`; grid (tiles, H, chunks of the batch).

    A program takes one tile through a chunk: the tile of the bias and the sum of its gradients stay in registers
    and the sum is stored once. ``sums`` is (chunks, H, N, edge).
    """
    head, across = tl.program_id(1), tl.cdiv(N, COLUMNS)
    row, first = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
    rows = row + tl.arange(0, ROWS)
    added = _load_bias(bias + head * bias_head_step, row, first, bias_row_step, N, edge, ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for sample in range(tl.program_id(2) * chunk, tl.minimum(tl.program_id(2) * chunk + chunk, B)):
        queries = qkv + tl.cast(sample, tl.int64) * sample_step + head * head_step
        q = _load(queries, row, token_step, N, D, WIDE, ROWS)
        g = _load(grad + tl.cast(sample, tl.int64) * N * H * D + head * D, row, H * D, N, D, WIDE, ROWS)
        k = _load(queries + part_step, first, token_step, N, D, WIDE, COLUMNS)
        v = _load(queries + 2 * part_step, first, token_step, N, D, WIDE, COLUMNS)
        place = (sample * H + head) * N + rows
        level = tl.load(lse + place, mask=rows < N, other=0.0)
        shift = tl.load(delta + place, mask=rows < N, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale + added
        p = tl.exp2(logits * LOG2E - level[:, None])
        total += p * (tl.dot(g, tl.trans(v), input_precision=EXACT) - shift[:, None])
    places = sums + tl.cast(tl.program_id(2) * H + head, tl.int64) * N * edge + (row * edge + first)
    down, along = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (down[:, None] < N - row) & (along[None, :] < edge - first)
    tl.store(places + down[:, None] * edge + along[None, :], total, mask=inside)


@triton.jit
def key_gradients(
    qkv, bias, grad, lse, delta, grad_qkv, sample_step, token_step, part_step, head_step,
    bias_head_step, bias_row_step, N, H, edge, scale,
    D: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, after :func:`query_gradients`; grid (B · H · tiles of keys).

    Logits are computed transposed, keys by queries, so that their products with gradients need no transposition.
    """
    each, column = tl.program_id(0) // tl.cdiv(N, COLUMNS), tl.program_id(0) % tl.cdiv(N, COLUMNS) * COLUMNS
    sample, head = each // H, each % H
    queries = qkv + tl.cast(sample, tl.int64) * sample_step + head * head_step
    grads = grad + tl.cast(sample, tl.int64) * N * H * D + head * D
    k = _load(queries + part_step, column, token_step, N, D, WIDE, COLUMNS)
    v = _load(queries + 2 * part_step, column, token_step, N, D, WIDE, COLUMNS)
    dk = tl.zeros((COLUMNS, WIDE), tl.float32)
    dv = tl.zeros((COLUMNS, WIDE), tl.float32)
    for first in range(0, N, ROWS):
        rows = first + tl.arange(0, ROWS)
        q = _load(queries, first, token_step, N, D, WIDE, ROWS)
        g = _load(grads, first, H * D, N, D, WIDE, ROWS)
        level = tl.load(lse + each * N + rows, mask=rows < N, other=0.0)
        shift = tl.load(delta + each * N + rows, mask=rows < N, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=EXACT) * scale
        if BIASED:
            across, down = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
            inside = (across[None, :] < N - first) & (down[:, None] < edge - column)
            offsets = across[None, :] * bias_row_step + down[:, None]
            start = bias + (head * bias_head_step + first * bias_row_step + column)
            logits += tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp2(logits * LOG2E - level[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=EXACT)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=EXACT) - shift[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=EXACT)
    keys = grad_qkv + tl.cast(sample, tl.int64) * N * 3 * H * D + (H + head) * D
    _store(keys, dk * scale, column, 3 * H * D, N, D, WIDE, COLUMNS)
    _store(keys + H * D, dv, column, 3 * H * D, N, D, WIDE, COLUMNS)


@triton.jit
def _load(start, first, token_step, N, D: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """Vectors (COUNT, WIDE) of one head, of tokens from ``first`` on; zeros for those from N on, and behind D."""
    tokens, values = tl.arange(0, COUNT), tl.arange(0, WIDE)
    inside = tokens[:, None] < N - first
    if D < WIDE:
        inside = inside & (values[None, :] < D)
    offsets = tokens[:, None] * token_step + values[None, :]
    return tl.load(start + first * token_step + offsets, mask=inside, other=0.0)


@triton.jit
def _store(start, what, first, token_step, N, D: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """Vectors (COUNT, WIDE) of one head, as those of :func:`_load`."""
    tokens, values = tl.arange(0, COUNT), tl.arange(0, WIDE)
    inside = tokens[:, None] < N - first
    if D < WIDE:
        inside = inside & (values[None, :] < D)
    offsets = tokens[:, None] * token_step + values[None, :]
    tl.store(start + first * token_step + offsets, what.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _load_bias(start, row, first, row_step, N, edge, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of one head's bias in fp32; what lies from ``edge`` on is 0, and from N to there anything."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows[:, None] < N - row) & (columns[None, :] < edge - first)
    offsets = rows[:, None] * row_step + columns[None, :]
    return tl.load(start + (row * row_step + first) + offsets, mask=inside, other=0.0).to(tl.float32)
