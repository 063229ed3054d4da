"""The batched solver finds what others find, for every strength of a grid at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from beit_dist.probing import linear

STRENGTHS = (1.0, 1e-1, 1e-2)


def problem(images: int = 300, width: int = 24, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised features of unequal directions, and classes that they tell apart, but not quite."""
    random = np.random.default_rng(0)
    mixed, _ = np.linalg.qr(random.normal(size=(width, width)))
    features = random.normal(size=(images, width)) * np.arange(1, width + 1) ** -1.0 @ mixed
    features = (features - features.mean(0)) / features.std(0)
    logits = features @ random.normal(size=(width, classes)) + random.gumbel(size=(images, classes))
    return torch.from_numpy(features).float(), torch.from_numpy(logits.argmax(1))


def by_scipy(features: torch.Tensor, labels: torch.Tensor, classes: int, strength: float) -> np.ndarray:
    """Logits at the minimum, by L-BFGS in float64 with gradients of autograd."""
    exact, width = features.double(), features.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.from_numpy(flat).requires_grad_()
        weights = values.view(width + 1, classes)
        logits = exact @ weights[:-1] + weights[-1]
        total = torch.nn.functional.cross_entropy(logits, labels) + strength / 2 * weights[:-1].square().sum()
        total.backward()
        return total.item(), values.grad.numpy()

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-8}
    found = minimize(loss, np.zeros((width + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    weights = found.x.reshape(width + 1, classes)
    return exact.numpy() @ weights[:-1] + weights[-1]


def centred(logits: np.ndarray) -> np.ndarray:
    """A constant for all classes means nothing, and has no penalty in the biases."""
    return logits - logits.mean(-1, keepdims=True)


def test_it_finds_the_minimum_that_scipy_finds_for_every_strength() -> None:
    features, labels = problem()
    found = linear.fit(features, labels, 5, STRENGTHS)
    for place, strength in enumerate(STRENGTHS):
        logits = (features @ found.weights[:, place] + found.biases[place]).numpy()
        expected = by_scipy(features, labels, 5, strength)
        np.testing.assert_allclose(centred(logits), centred(expected), atol=0.02)


def test_a_grid_gives_what_each_strength_gives_alone() -> None:
    features, labels = problem(100)
    together = linear.fit(features, labels, 5, STRENGTHS).predict(features)
    for place, strength in enumerate(STRENGTHS):
        alone = linear.fit(features, labels, 5, [strength]).predict(features)
        assert (alone[0] == together[place]).float().mean() > 0.98


def test_pieces_change_nothing_but_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(100)
    whole = linear.fit(features, labels, 5, STRENGTHS)
    monkeypatch.setattr(linear, "_AT_ONCE", 30 * 15)
    pieces = linear.fit(features, labels, 5, STRENGTHS)
    torch.testing.assert_close(pieces.weights, whole.weights, rtol=1e-3, atol=1e-4)
    assert pieces.predict(features).shape == (3, 100)


@pytest.mark.parametrize("images", [1, 6])
def test_fewer_images_than_features_are_told_apart_and_features_that_are_all_alike_are_left_out(
    images: int,
) -> None:
    features, labels = (each[:images] for each in problem())
    features[:, 0] = 0
    features = features - features.mean(0)
    found = linear.fit(features, labels, 5)
    assert bool(found.weights.isfinite().all())
    assert found.predict(features)[-1].tolist() == labels.tolist()  # as weak a penalty separates them


def test_classes_without_images_are_never_predicted() -> None:
    features, labels = problem()
    found = linear.fit(features, labels, 9)
    assert int(found.predict(features).max()) < 5
