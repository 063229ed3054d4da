"""Neighbours vote as DINO has them: by cosine, each with the exponential of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from beit_dist.probing import neighbours


def by_hand(row: np.ndarray, known: np.ndarray, labels: np.ndarray, classes: int) -> int:
    """One image's class, a vote after the other."""
    cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in known]
    votes = [0.0] * classes
    for place in sorted(range(len(known)), key=lambda place: -cosines[place])[:20]:
        votes[labels[place]] += np.exp(cosines[place] / 0.07)
    return int(np.argmax(votes))


def test_predictions_are_those_of_a_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    known, labels, rows = random.normal(size=(60, 8)), random.integers(0, 4, 60), random.normal(size=(30, 8))
    expected = [by_hand(row, known, labels, 4) for row in rows]
    given = (torch.from_numpy(each) for each in (rows, known, labels))
    rows_, known_, labels_ = given
    assert neighbours.predict(rows_, known_, labels_, 4).tolist() == expected
    monkeypatch.setattr(neighbours, "_AT_ONCE", 7 * 60)
    assert neighbours.predict(rows_, known_, labels_, 4).tolist() == expected


def test_twenty_neighbours_vote_and_no_more() -> None:
    angles = 1e-3 * torch.arange(1, 22, dtype=torch.float64)  # all about as near, the first a little more
    known = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([1] * 9 + [0] * 10 + [1, 0])  # 19 or 21 would answer 0
    assert neighbours.predict(torch.tensor([[1.0, 0.0]], dtype=torch.float64), known, labels, 2).tolist() == [1]


def test_fewer_images_than_neighbours_all_vote() -> None:
    known, labels = torch.eye(3), torch.tensor([2, 0, 1])
    assert neighbours.predict(known * 5, known, labels, 3).tolist() == [2, 0, 1]
