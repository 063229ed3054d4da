"""What a fine-tuned model says of held-out images: which classes it confuses, and where it is most wrong."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from beit_dist.images.labelled.reading import read_image
from beit_dist.inference.classification import ClassificationModel
from beit_dist.reports.html.embedded import Pixels, data_uri
from beit_dist.reports.html.models import Models, batches
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject
from beit_dist.stream.labelled.held_out import measured

_BATCH, _READERS = 64, 4
_MOST_CLASSES = 20
"""Of the matrix; of more, those that are confused most are shown."""
_MOST_PAIRS = 8
_SIDE = 176


@dataclass(frozen=True)
class Cell:
    """Of the matrix."""

    count: int
    share: float
    """Of the images of its row, 0 to 1."""

    @property
    def is_strong(self) -> bool:
        """Whether its number is in light letters, on dark paper."""
        return self.share > 0.5

    @property
    def shade(self) -> float:
        """How much colour it has, 0 to 1; none between weak and strong, where no letters are readable."""
        return 0.7 + 0.3 * self.share if self.is_strong else 0.8 * self.share


@dataclass(frozen=True)
class Wrong:
    """An image whose class is told wrong."""

    name: str
    picture: str
    true: str
    said: str
    probability: float
    """Of what is said."""


@dataclass(frozen=True)
class Predictions:
    """Of a run."""

    images: int
    of: int
    """So many held-out images there are."""
    accuracy: float
    classes: tuple[str, ...]
    """Of the matrix, in its order."""
    all_classes: int
    matrix: tuple[tuple[Cell, ...], ...]
    """Rows are true classes."""
    pairs: tuple[tuple[str, str, int, int], ...]
    """True class, what was said, how often, and of how many; the most frequent first."""
    wrong: tuple[Wrong, ...]
    """The surest mistakes first."""


def predictions_of(run: Subject, models: Models, most: int, pictures: int) -> Predictions | Missing:
    """Predict held-out images.

    Args:
        run: a classification.
        models: loads its model.
        most: images that are predicted, spread evenly.
        pictures: mistakes that are shown.

    Raises:
        UserError: there is no whole checkpoint, or no held-out image, or one is damaged.
    """
    if not run.has_checkpoint:
        return Missing("The run has no checkpoint yet. Make the report again when it has saved one.")
    model = models.of(run)
    assert isinstance(model, ClassificationModel)
    found = models.labelled(run, model.classes)
    rows = measured(len(found), most)
    with ThreadPoolExecutor(_READERS) as readers:
        pixels: list[Pixels] = list(
            readers.map(lambda row: model.prepare(read_image(found.files[row], models.access)), rows)
        )
    with torch.no_grad():
        scores = torch.cat([model.probabilities(batch).float().cpu() for batch in batches(pixels, _BATCH)]).numpy()
    labels, said = found.labels[rows], scores.argmax(1)
    confusion = np.zeros((len(model.classes),) * 2, np.int64)
    np.add.at(confusion, (labels, said), 1)
    sure = scores[np.arange(len(rows)), said]
    mistakes = sorted(np.flatnonzero(labels != said).tolist(), key=lambda place: -sure[place])
    wrong = tuple(
        Wrong(
            found.files[rows[place]].name,
            data_uri(pixels[place], _SIDE),
            model.classes[labels[place]],
            model.classes[said[place]],
            float(sure[place]),
        )
        for place in mistakes[:pictures]
    )
    shown = most_confused(confusion)
    return Predictions(
        images=len(rows),
        of=len(found),
        accuracy=float((labels == said).mean()),
        classes=tuple(model.classes[number] for number in shown),
        all_classes=len(model.classes),
        matrix=_cells(confusion, shown),
        pairs=tuple(_pairs(confusion, model.classes)),
        wrong=wrong,
    )


def most_confused(confusion: NDArray[np.int64]) -> list[int]:
    """The classes of the matrix, in their order: all, or those with most mistakes from or to them."""
    mistakes = confusion.sum(0) + confusion.sum(1) - 2 * np.diag(confusion)
    order = np.argsort(-mistakes, kind="stable")[:_MOST_CLASSES]
    return sorted(order.tolist())


def _cells(confusion: NDArray[np.int64], shown: Sequence[int]) -> tuple[tuple[Cell, ...], ...]:
    totals = confusion.sum(1)
    return tuple(
        tuple(
            Cell(int(confusion[row, column]), float(confusion[row, column] / max(1, totals[row])))
            for column in shown
        )
        for row in shown
    )


def _pairs(confusion: NDArray[np.int64], classes: Sequence[str]) -> list[tuple[str, str, int, int]]:
    mistakes, totals = confusion.copy(), confusion.sum(1)
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_MOST_PAIRS]
    found = [np.unravel_index(place, mistakes.shape) for place in order]
    return [
        (classes[true], classes[said], int(mistakes[true, said]), int(totals[true]))
        for true, said in found
        if mistakes[true, said]
    ]
