"""How good the features of a layer are, and which layer's are best: chosen on training images, told of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_dist.probing import linear, neighbours
from beit_dist.probing.split import Rows, Split

_EPS = 1e-6
"""Deviation of a feature that is the same in all images."""


class Score(NamedTuple):
    """Shares of images that a classifier gets right."""

    choice: float
    """Of held-out training images, by which layers are compared."""
    test: float


class LayerScores(NamedTuple):
    """What the features of a layer are worth."""

    layer: int
    linear: Score
    strength: float
    """L2 penalty of the linear classifier, chosen like the layer."""
    knn: Score

    def facts(self) -> dict[str, Any]:
        """As JSON takes it."""
        linear, knn = self.linear._asdict(), self.knn._asdict()
        return {"layer": self.layer, "linear": {**linear, "l2": self.strength}, "knn": knn}


@torch.no_grad()
def scores_of(layer: int, features: Tensor, labels: Rows, split: Split, classes: int) -> LayerScores:
    """Fit to a part of the training images, choose on the others; then fit to all of them, and test.

    Args:
        layer: its number.
        features: fp32 (N, D), on the device that computes.
        labels: (N,)
    """
    right = torch.from_numpy(labels).to(features.device)
    rows = {name: torch.from_numpy(part).to(features.device) for name, part in split._asdict().items()}
    fit, choice = _standardised(features, rows["fit"], rows["choice"])
    guessed = linear.fit(fit, right[rows["fit"]], classes).predict(choice)
    shares = (guessed == right[rows["choice"]]).float().mean(1)
    best = int(shares.argmax())  # of equals the first, which is the strongest
    knn = neighbours.predict(choice, fit, right[rows["fit"]], classes)
    knn_choice = _share(knn, right[rows["choice"]])
    del fit, choice
    training = torch.from_numpy(split.training).to(features.device)
    fit, test = _standardised(features, training, rows["test"])
    strength = linear.STRENGTHS[best]
    chosen = linear.fit(fit, right[training], classes, [strength]).predict(test)[0]
    knn = neighbours.predict(test, fit, right[training], classes)
    return LayerScores(
        layer,
        Score(float(shares[best]), _share(chosen, right[rows["test"]])),
        strength,
        Score(knn_choice, _share(knn, right[rows["test"]])),
    )


def best_linear(scores: Sequence[LayerScores]) -> LayerScores:
    """The layer whose linear classifier is best on held-out training images; of equals the first."""
    return max(scores, key=lambda one: one.linear.choice)


def best_knn(scores: Sequence[LayerScores]) -> LayerScores:
    """The layer whose neighbours are best on held-out training images; of equals the first."""
    return max(scores, key=lambda one: one.knn.choice)


def _standardised(features: Tensor, known: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the features, with mean 0 and deviation 1 in the first."""
    fit, rest = features[known], features[others]
    mean, deviation = fit.mean(0), fit.std(0, correction=0) + _EPS
    return fit.sub_(mean).div_(deviation), rest.sub_(mean).div_(deviation)


def _share(guessed: Tensor, right: Tensor) -> float:
    return float((guessed == right).float().mean())
