"""Which labelled images a probe fits, chooses and tests on: the same ones for every run and every seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.draws import Purpose, permutation
from beit_dist.errors import ConfigError

SHARE = 0.2
"""Of each class's images, held out to choose on, and to test on where no other images are given."""
_SEED = 0
"""Not the run's: runs of different seeds are compared on the same images."""
_SAMPLES, _TEST, _CHOICE = range(3)

Rows = NDArray[np.int64]


class Split(NamedTuple):
    """Rows of a list of labelled images, ascending."""

    fit: Rows
    """For the classifiers among which is chosen."""
    choice: Rows
    """Held out of the training images: strength and layer are chosen by the accuracy on them."""
    test: Rows
    """Of which the accuracy is told; nothing is chosen by them."""

    @property
    def training(self) -> Rows:
        """What the chosen classifier is fitted to."""
        return np.sort(np.concatenate([self.fit, self.choice]))


def some(images: int, most: int | None) -> Rows:
    """``most`` of a number of images, ascending; all where there are no more."""
    order = permutation(_SEED, Purpose.PROBE_SPLIT, (_SAMPLES,), images)
    return np.sort(order[:most])


def split(labels: Rows, test: Rows | None = None, *, field: str) -> Split:
    """Split labelled images.

    Args:
        labels: (N,) classes of the training images and, behind them, of ``test``.
        test: (M,) the last rows, which are tested on; None holds out a fifth of each class.
        field: the setting that names the images, for messages.

    Raises:
        ConfigError: there are too few to choose on some, or only one class.
    """
    rows = np.arange(len(labels))
    if test is None:
        test = rows[_held_out(labels, _TEST)]
    training = np.setdiff1d(rows, test)
    choice = training[_held_out(labels[training], _CHOICE)]
    fit = np.setdiff1d(training, choice)
    if not len(choice) or not len(test):
        few = f"{len(labels):,} images, no class with enough of them"
        raise ConfigError(
            field, few, "two images or more of a class, to choose on one of them", "Give more images."
        )
    if len(np.unique(labels[training])) < 2:
        raise ConfigError(field, "images of one class", "images of two classes or more")
    return Split(fit, choice, test)


def commonest_share(labels: Rows, split: Split) -> float:
    """The share of the tested images that are of the commonest class of the training images."""
    commonest = np.bincount(labels[split.training]).argmax()
    return float(np.mean(labels[split.test] == commonest))


def _held_out(labels: Rows, key: int) -> NDArray[np.bool_]:
    """A fifth of the images of each class, at least one; none of a class with one image."""
    counts = np.bincount(labels)
    taken = np.where(counts > 1, np.maximum(1, np.round(SHARE * counts)), 0)
    order = permutation(_SEED, Purpose.PROBE_SPLIT, (key,), len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), bool)
    chosen[by_class] = place < taken[labels[by_class]]
    return chosen
