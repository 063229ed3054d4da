"""Nearest neighbours: the class that the most similar training images vote for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""As DINO measures (arXiv 2104.14294, section 4.1; ``eval_knn.py``): 20 neighbours, votes exp(cosine / 0.07)."""
_AT_ONCE = 1 << 25
"""Most similarities in memory."""


@torch.no_grad()
def predict(features: Tensor, known: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The class of each of (N, D) features, int64 (N,), by cosine to ``known`` (M, D) of ``labels`` (M,)."""
    known = F.normalize(known)
    found = []
    size = max(1, _AT_ONCE // max(len(known), classes))
    for low in range(0, len(features), size):
        rows = features[low : low + size]
        near = (F.normalize(rows) @ known.T).topk(min(NEIGHBOURS, len(known)))
        votes = (near.values / TEMPERATURE).exp()
        found.append(rows.new_zeros(len(rows), classes).scatter_add_(1, labels[near.indices], votes).argmax(1))
    return torch.cat(found)
