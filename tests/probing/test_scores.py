"""Layer and strength are chosen on training images that are held out, and on no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from beit_dist.probing.scores import LayerScores, Score, best_knn, best_linear, scores_of
from beit_dist.probing.split import split

LABELS = np.arange(120) % 3


def features(signal: float) -> torch.Tensor:
    """Noise, and some of what the class is; one feature is the same in all images."""
    random = np.random.default_rng(0)
    made = random.normal(size=(120, 10)) + signal * random.normal(size=(3, 10))[LABELS]
    made[:, 0] = 7
    made[:, 1] = 1e4 * random.normal(size=120)  # as large as some features of large models, and of no use
    return torch.from_numpy(made).float()


def test_features_that_tell_classes_apart_score_high_and_noise_does_not() -> None:
    parted = split(LABELS, field="data")
    told, noise = (scores_of(1, features(signal), LABELS, parted, 3) for signal in (3.0, 0.0))
    assert min(*told.linear, *told.knn) > 0.95
    assert noise.linear.test < 0.6


def test_images_that_are_tested_on_choose_nothing() -> None:
    parted = split(LABELS, field="data")
    others = LABELS.copy()
    others[parted.test] = (others[parted.test] + 1) % 3
    right, wrong = (scores_of(1, features(1.0), labels, parted, 3) for labels in (LABELS, others))
    assert (right.linear.choice, right.strength, right.knn.choice) == (
        wrong.linear.choice,
        wrong.strength,
        wrong.knn.choice,
    )
    assert right.linear.test > wrong.linear.test


def test_the_layer_is_chosen_by_held_out_training_images() -> None:
    layers = [
        LayerScores(1, Score(0.5, 0.9), 1.0, Score(0.3, 0.2)),
        LayerScores(2, Score(0.6, 0.5), 0.1, Score(0.3, 0.9)),
        LayerScores(3, Score(0.6, 0.7), 0.1, Score(0.2, 0.9)),
    ]
    assert best_linear(layers).layer == 2
    assert best_knn(layers).layer == 1
    facts = {"layer": 2, "linear": {"choice": 0.6, "test": 0.5, "l2": 0.1}, "knn": {"choice": 0.3, "test": 0.9}}
    assert layers[1].facts() == facts


def test_of_strengths_that_are_equally_good_the_strongest_is_chosen() -> None:
    assert scores_of(1, features(50.0), LABELS, split(LABELS, field="data"), 3).strength == pytest.approx(10)
