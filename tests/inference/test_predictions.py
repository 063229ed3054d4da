"""What fine-tuned runs predict is what they have measured themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.finished_runs import measured

import beit_dist
from beit_dist.errors import ConfigError, DataError
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.segmentation import SegmentationModel


@pytest.fixture(scope="session")
def classifier(classes: Path) -> ClassificationModel:
    model = beit_dist.load(classes, ema=True)
    assert isinstance(model, ClassificationModel)
    return model


@pytest.fixture(scope="session")
def segmenter(segments: Path) -> SegmentationModel:
    model = beit_dist.load(segments)
    assert isinstance(model, SegmentationModel)
    return model


def test_a_classifier_has_the_accuracy_and_the_loss_that_its_run_measured(
    classifier: ClassificationModel, classes: Path, runs: Path
) -> None:
    assert classifier.classes == ("amber", "blue", "green")
    files = sorted((runs / "test").rglob("*.png"))
    truth = torch.tensor([classifier.classes.index(file.parent.name) for file in files])
    likely, expected = classifier.probabilities(files), measured(classes)
    guesses = [guesses[0].name for guesses in classifier.predict(files)]
    right = sum(guess == file.parent.name for guess, file in zip(guesses, files, strict=True))
    assert expected["accuracy"] == pytest.approx(right / len(files))
    assert expected["loss"] == pytest.approx(-likely.gather(1, truth[:, None]).log().mean().item(), rel=1e-5)
    trained = beit_dist.load(classes)
    assert isinstance(trained, ClassificationModel)
    assert not torch.allclose(trained.probabilities(files), likely, atol=1e-3)  # the average is what is measured


def test_guesses_are_named_and_ordered(classifier: ClassificationModel, runs: Path) -> None:
    file = next((runs / "test" / "green").iterdir())
    (guesses,) = classifier.predict(file, top=2)
    assert len(guesses) == 2
    assert guesses[0].probability >= guesses[1].probability
    likely = classifier.probabilities(file)[0]
    assert guesses[0].probability == pytest.approx(likely.max().item())
    assert guesses[0].name == classifier.classes[int(likely.argmax())]
    assert sum(guess.probability for guess in classifier.predict(file)[0]) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ConfigError, match="top: got 0, expected at least 1"):
        classifier.predict(file, top=0)


def test_gradients_flow_through_logits(classifier: ClassificationModel) -> None:
    images = torch.zeros(2, 3, 32, 32, requires_grad=True)
    classifier.logits(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_segmenter_has_the_iou_that_its_run_measured(
    segmenter: SegmentationModel, segments: Path, runs: Path
) -> None:
    assert segmenter.classes == ("red", "green", "blue")
    files = sorted((runs / "images" / "test").iterdir())
    confusion = np.zeros((3, 3), np.int64)
    for file, found in zip(files, segmenter.predict(files), strict=True):
        truth = np.asarray(Image.open(runs / "labels" / "test" / file.name))
        assert found.labels.shape == truth.shape
        np.add.at(confusion, (truth[truth != 9], found.labels[truth != 9]), 1)
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    expected = measured(segments)
    assert expected["pixels"] == confusion.sum()
    assert expected["accuracy"] == pytest.approx(right.sum() / confusion.sum(), abs=1e-9)
    assert expected["mean_iou"] == pytest.approx((right / union)[union > 0].mean(), abs=1e-9)
    once = segmenter.predict(files, thoroughly=False)
    assert any((a.labels != b.labels).any() for a, b in zip(once, segmenter.predict(files), strict=True))


def test_segments_are_the_same_however_an_image_arrives(segmenter: SegmentationModel, runs: Path) -> None:
    file = sorted((runs / "images" / "test").iterdir())[0]
    pixels = np.asarray(Image.open(file))
    (expected,) = segmenter.predict(str(file))
    for form in (pixels, Image.open(file), torch.from_numpy(pixels.copy()), torch.tensor(pixels).permute(2, 0, 1)):
        (found,) = segmenter.predict(form)
        assert np.array_equal(found.labels, expected.labels)
    shares = expected.shares
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    for name, share in shares.items():
        assert share == pytest.approx((expected.labels == segmenter.classes.index(name)).mean())


def test_a_normalised_tensor_is_one_window(segmenter: SegmentationModel, photos: list[Path]) -> None:
    pixels = torch.from_numpy(segmenter.prepare(photos[0]))
    (found,) = segmenter.probabilities(segmenter.normalise(pixels))
    with torch.no_grad():
        expected = segmenter.network(segmenter.patches_of(pixels))[0][0].softmax(0)
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"expected normalised pixels \(3, 32, 32\)"):
        list(segmenter.probabilities(torch.zeros(1, 3, 40, 40)))
    with pytest.raises(ConfigError, match=r"expected uint8 \(H, W, 3\)"):
        segmenter.predict(torch.zeros(4, 40, 40, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"missing\.png: cannot be read"):
        segmenter.predict("missing.png")


def test_statistics_keep_their_precision_in_bf16(segmenter: SegmentationModel, segments: Path) -> None:
    low = beit_dist.load(segments, dtype=torch.bfloat16)
    assert low.network.cls_token.dtype == torch.bfloat16
    exact = {name: buffer for name, buffer in segmenter.named_buffers() if name.endswith("running_var")}
    assert exact
    for name, buffer in low.named_buffers():
        if name in exact:
            assert torch.equal(buffer, exact[name])
