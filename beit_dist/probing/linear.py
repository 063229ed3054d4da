"""Linear classifiers of frozen features: multinomial logistic regression, for several strengths of L2 at once.

The problem is convex and small beside the backbone, so it is solved, and not trained: nothing is drawn and no rate
is tuned. scikit-learn's ``LogisticRegression`` solves the same one on the CPU for one strength at a time; a whole
grid here is a few large products on whatever device there is.

Features are rotated to their principal axes first, which changes neither the loss nor the norm of the weights.
There the curvature of the loss has a diagonal bound, half the variance along an axis (Böhning, "Multinomial
logistic regression algorithm", 1992), which gives each weight a safe step. Nesterov's momentum, begun anew where
it leads uphill (O'Donoghue and Candès, arXiv 1204.3982), takes few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(1, -8, -1))
"""L2 penalties that are tried, strongest first: λ in mean loss + λ / 2 · ‖weights‖², of standardised features."""
TOLERANCE = 1e-4
"""Largest entry of a gradient that counts as solved (scikit-learn's)."""
_STEPS, _LOOK = 500, 10
"""Most steps, and steps between two looks at the gradient, for which the device is waited for."""
_AT_ONCE = 1 << 25
"""Most logits in memory."""
_EMPTY = 1e-9
"""Variance along an axis, as a share of the largest, below which there is nothing but rounding."""


class Linear(NamedTuple):
    """Fitted classifiers, one for each strength."""

    weights: Tensor
    """(D, G, K)"""
    biases: Tensor
    """(G, K)"""

    def predict(self, features: Tensor) -> Tensor:
        """The likeliest class of each of (N, D) features: int64 (G, N)."""
        width, strengths, classes = self.weights.shape
        flat = self.weights.reshape(width, -1)
        found = [
            ((rows @ flat).view(-1, strengths, classes) + self.biases).argmax(-1)
            for rows in _pieces(features, strengths * classes)
        ]
        return torch.cat(found).T


@torch.no_grad()
def fit(features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float] = STRENGTHS) -> Linear:
    """Minimise mean cross-entropy + λ / 2 · ‖weights‖² for each λ of ``strengths``; biases are not penalised.

    Args:
        features: fp32 (N, D), centred.
        labels: int64 (N,) below ``classes``, on the same device.
    """
    variances, axes = _principal_axes(features)
    rotated = features @ axes
    penalty = features.new_tensor(strengths)[:, None]
    steps = 1 / (variances[:, None, None] / 2 + penalty)  # (axes, G, 1)
    weights = features.new_zeros(len(variances), len(strengths), classes)
    biases = features.new_zeros(len(strengths), classes)
    ahead_weights, ahead_biases = weights, biases
    age = features.new_ones(len(strengths), 1)
    for number in range(_STEPS):
        slope, bias_slope = _gradient(rotated, labels, ahead_weights, ahead_biases)
        slope += penalty * ahead_weights
        if number % _LOOK == 0 and max(slope.abs().max(), bias_slope.abs().max()) < TOLERANCE:
            break
        new_weights, new_biases = ahead_weights - steps * slope, ahead_biases - 2 * bias_slope
        moved, bias_moved = new_weights - weights, new_biases - biases
        uphill = (slope * moved).sum((0, 2)) + (bias_slope * bias_moved).sum(-1) > 0
        age = torch.where(uphill[:, None], 1.0, age)
        older = (1 + (1 + 4 * age.square()).sqrt()) / 2
        momentum = (age - 1) / older
        weights, biases, age = new_weights, new_biases, older
        ahead_weights, ahead_biases = weights + momentum * moved, biases + momentum * bias_moved
    return Linear(torch.einsum("da,agk->dgk", axes, ahead_weights), ahead_biases)


def _principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (A,) of centred features along their principal axes (D, A); axes without variance are left out."""
    width = features.shape[1]
    products = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for rows in _pieces(features, width):
        exact = rows.double()
        products.addmm_(exact.T, exact)
    variances, axes = torch.linalg.eigh(products / len(features))  # ascending
    kept = variances > _EMPTY * variances[-1]
    kept[-1] = True  # there need not be any
    return variances[kept].float(), axes[:, kept].float()


def _gradient(features: Tensor, labels: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean cross-entropy, by weights (A, G, K) and biases (G, K)."""
    width, strengths, classes = weights.shape
    flat = weights.reshape(width, -1)
    slope, bias_slope = torch.zeros_like(flat), torch.zeros_like(biases)
    pieces = zip(_pieces(features, strengths * classes), _pieces(labels, strengths * classes), strict=True)
    for rows, right in pieces:
        logits = (rows @ flat).view(-1, strengths, classes) + biases
        error = logits.softmax(-1) - F.one_hot(right, classes).unsqueeze(1)
        slope.addmm_(rows.T, error.flatten(1))
        bias_slope += error.sum(0)
    return slope.view_as(weights) / len(features), bias_slope / len(features)


def _pieces(rows: Tensor, values: int) -> Sequence[Tensor]:
    """Rows in pieces for which so many values each fit into memory."""
    size = max(1, _AT_ONCE // values)
    return [rows[low : low + size] for low in range(0, len(rows), size)]
