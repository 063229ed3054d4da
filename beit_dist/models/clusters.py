"""k-means, in a few lines of torch: neither PyTorch nor anything else this project needs has one."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 12
_CELLS = 1 << 25
"""Distances in memory at once: 128 MiB of them."""


def k_means(points: Tensor, clusters: int, seed: int = 0, rounds: int = _ROUNDS) -> Tensor:
    """Centres float32 ``(clusters, D)`` of points ``(N, D)``; the same in every call on the same machine.

    It starts from points that differ. Where there are fewer of these than clusters, some centres are alike.

    Args:
        seed: of the points it starts from.
        rounds: of Lloyd's algorithm. A centre that no point is nearest to stays where it is.
    """
    different = torch.unique(points, dim=0)
    picks = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    centres: Tensor = different[picks.repeat(-(-clusters // len(picks)))[:clusters]]
    for _ in range(rounds):
        own = nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, own, points)
        counts = torch.bincount(own, minlength=clusters)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The number of the centre nearest to each point: int64 ``(N,)``, the first of equals."""
    squares = centres.square().sum(1)
    parts = torch.split(points, max(1, _CELLS // len(centres)))
    return torch.cat([torch.addmm(squares, part, centres.t(), alpha=-2).argmin(1) for part in parts])
