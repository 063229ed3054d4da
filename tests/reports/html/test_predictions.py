"""The confusion matrix counts what the model says of each held-out image, and mistakes come surest first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.classes import write_classes
from support.reported import SMALL, make_run, subjects

from beit_dist.config.model import BackboneConfig
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.preparing import Preparation
from beit_dist.inference.provenance import Provenance
from beit_dist.models.classifier import ImageClassifier
from beit_dist.reports.drawing import Wishes
from beit_dist.reports.html import models
from beit_dist.reports.html.models import Models
from beit_dist.reports.html.predictions import Predictions, predictions_of
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject
from beit_dist.storage.access import Access

CLASSES = ("amber", "blue", "green")


class ByBlue(ClassificationModel):
    """Calls an image blue if it is, and amber else: the surer, the darker its red is."""

    def probabilities(self, images: object) -> torch.Tensor:
        assert isinstance(images, torch.Tensor)
        red, _, blue = images.float().mean((1, 2)).unbind(1)
        sure = 0.99 - red / 1000
        found = torch.zeros(len(images), 3)
        found[torch.arange(len(images)), (blue > 150).long()] = sure
        return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A classification of 4 amber, 3 blue and 2 green images."""
    data = str(write_classes(tmp_path / "val", (4, 3, 2)))
    folder = make_run(tmp_path / "run", "classification", recipe={"data": data, "validation": {"data": data}})
    config = BackboneConfig(**SMALL)
    model = ByBlue(
        ImageClassifier(config, 3), Provenance("r", "classification", "d"), Preparation(config), CLASSES
    )
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    monkeypatch.setattr(Subject, "has_checkpoint", True)
    (found,) = subjects(folder)
    return found


def found(run: Subject, most: int = 100, pictures: int = 5) -> Predictions:
    predictions = predictions_of(run, Models(Wishes(), Access()), most, pictures)
    assert isinstance(predictions, Predictions)
    return predictions


def test_the_matrix_has_true_classes_in_rows_and_what_is_said_in_columns(run: Subject) -> None:
    predictions = found(run)
    assert predictions.classes == CLASSES
    assert [[cell.count for cell in row] for row in predictions.matrix] == [[4, 0, 0], [0, 3, 0], [2, 0, 0]]
    assert predictions.matrix[2][0].share == 1
    assert predictions.accuracy == pytest.approx(7 / 9)
    assert predictions.pairs == (("green", "amber", 2, 2),)


def test_mistakes_are_shown_the_surest_first_and_no_more_than_asked_for(run: Subject) -> None:
    wrong = found(run).wrong
    assert [(each.true, each.said) for each in wrong] == [("green", "amber")] * 2
    assert wrong[0].probability > wrong[1].probability > 0.9
    assert [each.name for each in found(run, pictures=1).wrong] == [wrong[0].name]


def test_so_many_images_are_predicted_as_asked_for(run: Subject) -> None:
    predictions = found(run, most=3)
    assert (predictions.images, predictions.of) == (3, 9)
    assert sum(cell.count for row in predictions.matrix for cell in row) == 3


def test_without_a_checkpoint_nothing_is_predicted(run: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "has_checkpoint", False)
    assert isinstance(predictions_of(run, Models(Wishes(), Access()), 5, 5), Missing)
