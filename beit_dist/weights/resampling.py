"""Positions of one resolution for another, as the original fine-tuning code does it.

unilm's ``run_class_finetuning.py`` resamples relative position tables by a cubic spline (SciPy's ``interp2d``,
which SciPy 1.14 removed) from points whose distances grow geometrically from the centre, and absolute positions
by PyTorch's bicubic interpolation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CLASS_ROWS = 3  # class token to patch, patch to class token, class token to itself: kept as they are
_LEAST_KNOTS = 4  # of a cubic spline

Array = np.ndarray[Any, np.dtype[np.float64]]


def grid_of_table(rows: int) -> int:
    """Side of the grid of patches that a relative position table with so many rows belongs to.

    Raises:
        ValueError: no square grid has such a table.
    """
    side = math.isqrt(max(0, rows - _CLASS_ROWS))
    if side * side != rows - _CLASS_ROWS or side % 2 == 0:
        raise ValueError(f"a relative position table of {rows} rows fits no square grid")
    return (side + 1) // 2


def resample_table(table: Tensor, grid: int) -> Tensor:
    """A relative position table ((2 · grid − 1)² + 3, heads) for another grid; fp32. The same one if it fits.

    Raises:
        ValueError: it is of no square grid.
    """
    if table.dim() != 2:
        raise ValueError(f"a relative position table must have 2 dimensions, not the shape {list(table.shape)}")
    source, target = 2 * grid_of_table(len(table)) - 1, 2 * grid - 1
    if source == target:
        return table
    if source < _LEAST_KNOTS:
        raise ValueError(f"a relative position table of {len(table)} rows is too small to be resampled")
    offsets = table[: source * source].double().numpy().reshape(source, source, -1)
    spline = _spline(_geometric(source, target), np.arange(target, dtype=np.float64) - target // 2)
    resampled = np.einsum("ys,sth,xt->yxh", spline, offsets, spline).reshape(target * target, -1)
    return torch.cat((torch.from_numpy(resampled).float(), table[source * source :].float()))


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Absolute positions (1, 1 + grid², C) for another grid; the class token's stays. The same if it fits.

    Raises:
        ValueError: they are of no square grid.
    """
    rows = positions.shape[1] if positions.dim() == 3 else 0
    source = math.isqrt(max(0, rows - 1))
    if rows < 2 or 1 + source**2 != rows:
        raise ValueError(f"pos_embed of size {list(positions.shape)} fits no square grid")
    if source == grid:
        return positions
    patches = positions[:, 1:].float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1].float(), resized.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def _geometric(source: int, target: int) -> Array:
    """Where the ``source`` old offsets lie on the axis of the new ones: their distances grow by one ratio q,
    found by bisection in [1.01, 1.5] so that the outermost lies at the edge of ``target``."""
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (source // 2)) / (1 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    side = np.cumsum(ratio ** np.arange(source // 2))
    return np.concatenate((-side[::-1], [0.0], side))


def _spline(knots: Array, at: Array) -> Array:
    """(len(at), len(knots)): the not-a-knot cubic spline through values at ``knots``, as a matrix on the values.

    Beyond the outermost knots the value there continues, as in FITPACK.
    """
    n, steps = len(knots), np.diff(knots)
    # Slopes at the knots from continuous second derivatives; at both ends, from a continuous third derivative.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        before, after = steps[i - 1], steps[i]
        left[i, i - 1 : i + 2] = after, 2 * (before + after), before
        right[i, i - 1 : i + 2] = 3 * np.array([-after / before, after / before - before / after, before / after])
    for row, (a, b), (i, j, k) in ((0, steps[:2], (0, 1, 2)), (-1, steps[:-3:-1], (n - 1, n - 2, n - 3))):
        sign = 1 if row == 0 else -1
        left[row, [i, j]] = b, a + b
        first, second = ((a + 2 * (a + b)) * b / (a + b)) / a, a * a / ((a + b) * b)
        right[row, [i, j, k]] = sign * np.array([-first, first - second, second])
    slopes = np.linalg.solve(left, right)
    at = np.clip(at, knots[0], knots[-1])
    part = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, n - 2)
    width = steps[part]
    t = (at - knots[part]) / width
    values = np.eye(n)
    terms = (
        ((1 + 2 * t) * (1 - t) ** 2, values[part]),
        (t * t * (3 - 2 * t), values[part + 1]),
        (t * (1 - t) ** 2 * width, slopes[part]),
        (t * t * (t - 1) * width, slopes[part + 1]),
    )
    total: Array = np.sum([weight[:, None] * matrix for weight, matrix in terms], axis=0)
    return total
