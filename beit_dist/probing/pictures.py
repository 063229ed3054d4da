"""The labelled images of a probe: which of them are looked at, and what for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from beit_dist.errors import ConfigError
from beit_dist.images.labelled.images import LabelledImages
from beit_dist.probing.split import Split, commonest_share, some, split


@dataclass(frozen=True)
class Pictures:
    """Labelled images, and what they are for."""

    images: LabelledImages
    """To fit to and choose on, and where there are others to test on, these behind them."""
    split: Split
    digest: tuple[str, str]
    """Of the sources to fit to, and of those to test on."""

    @property
    def baseline(self) -> float:
        """The share of the tested images that is right if the answer is always the commonest class."""
        return commonest_share(self.images.labels, self.split)


def pictures_of(
    training: LabelledImages, test: LabelledImages | None, samples: int | None, field: str
) -> Pictures:
    """Put training and test images together.

    Args:
        training: to fit to and choose on.
        test: whose classes are those of ``training``; None holds a fifth of ``training`` out.
        samples: most images of ``training``; None takes all.
        field: the setting that names ``training``.

    Raises:
        ConfigError: some images are in both, there are too few, or all are of one class.
    """
    chosen = taken(training, some(len(training), samples))
    if test is None:
        return Pictures(chosen, split(chosen.labels, field=field), (training.digest, ""))
    known = {str(file) for file in training.files}
    if both := next((file for file in test.files if str(file) in known), None):
        raise ConfigError("--test", str(both), f"images that are not in {field} too")
    labels = np.concatenate([chosen.labels, test.labels])
    together = replace(chosen, files=[*chosen.files, *test.files], labels=labels)
    parted = split(labels, np.arange(len(chosen), len(labels)), field=field)
    return Pictures(together, parted, (training.digest, test.digest))


def taken(images: LabelledImages, rows: Iterable[int]) -> LabelledImages:
    """Some of the images, in the order of ``rows``."""
    chosen = np.fromiter(rows, np.int64)
    return replace(images, files=[images.files[row] for row in chosen], labels=images.labels[chosen])
