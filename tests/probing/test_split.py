"""Images that choose are training images, images that are tested choose nothing, and both are always the same."""

from __future__ import annotations

import numpy as np
import pytest

from beit_dist.errors import ConfigError
from beit_dist.probing.split import commonest_share, some, split

PINNED_TEST = [1, 3, 7, 8, 18, 25, 26, 32]
PINNED_SOME = [4, 7, 8, 12, 13]


def labels(*counts: int) -> np.ndarray:
    """So many images of each class, in a mixed order."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(rows)


def test_a_fifth_of_each_class_is_tested_and_a_fifth_of_the_others_chooses() -> None:
    classes = labels(100, 50, 5)
    found = split(classes, field="data")
    assert sorted(np.concatenate(found).tolist()) == list(range(155))  # each image once
    assert np.bincount(classes[found.test]).tolist() == [20, 10, 1]
    assert np.bincount(classes[found.choice]).tolist() == [16, 8, 1]
    assert found.training.tolist() == sorted([*found.fit, *found.choice])


def test_images_to_test_on_choose_nothing() -> None:
    classes = np.concatenate([labels(10, 10), labels(4, 3)])
    found = split(classes, np.arange(20, 27), field="--data")
    assert found.test.tolist() == list(range(20, 27))
    assert len(found.choice) == 4
    assert set(found.training) == set(range(20))


def test_the_only_image_of_a_class_is_fitted_to() -> None:
    classes = labels(1, 10)
    found = split(classes, field="data")
    assert int(np.flatnonzero(classes == 0)[0]) in found.fit


def test_the_split_is_the_same_every_time() -> None:
    pinned = split(np.arange(40) % 2, field="data")
    assert pinned.test.tolist() == PINNED_TEST
    assert some(20, 5).tolist() == PINNED_SOME
    assert some(4, 5).tolist() == some(4, None).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([0], r"--data: got '1 images, no class with enough"),
        ([0, 1, 2], "no class with enough"),
        ([0] * 10, "got 'images of one class'"),
    ],
)
def test_too_few_images_and_one_class_are_refused(classes: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split(np.array(classes), field="--data")


def test_the_commonest_class_is_that_of_the_training_images() -> None:
    classes = np.array([0, 0, 0, 0, 1, 1, 1, 0, 1, 1])
    found = split(classes, np.arange(7, 10), field="data")
    assert commonest_share(classes, found) == pytest.approx(1 / 3)
