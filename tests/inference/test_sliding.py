"""Sliding windows and the scores of a segmentation, against answers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_dist.config.finetuning import SegmentationConfig
from beit_dist.config.labelled import SegmentationViewConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.images.labelled.views import SegmentationView
from beit_dist.inference.sliding import averaged, probabilities
from beit_dist.tasks.finetuning.segmentation import _score

SIDE, PATCH = 32, 8
BLACK = (0, 0, 0)


def unpatched(patches: Tensor) -> Tensor:
    """(B, 3, S, S) of patches in rows."""
    grid = SIDE // PATCH
    tiles = patches.view(-1, grid, grid, PATCH, PATCH, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, SIDE, SIDE)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 71), (90, 33), (20, 50), (7, 5)])
def test_windows_cover_every_pixel_once_however_large_the_image_is(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 20, (height, width, 3), dtype=np.uint8)
    windows = []

    def scores(patches: Tensor) -> Tensor:
        windows.append(len(patches))
        return unpatched(patches).float()

    found = probabilities(scores, pixels, (height, width), side=SIDE, patch=PATCH, stride=21, batch=2, fill=BLACK)
    expected = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).softmax(0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert max(windows) <= 2
    along = [math.ceil(max(0, length - SIDE) / 21) + 1 for length in (height, width)]
    assert sum(windows) == along[0] * along[1]


def test_an_image_smaller_than_a_window_is_padded_as_in_training() -> None:
    seen = []

    def scores(patches: Tensor) -> Tensor:
        seen.append(unpatched(patches))
        return torch.zeros(len(patches), 2, SIDE, SIDE)

    pixels = np.zeros((20, 50, 3), np.uint8)
    probabilities(scores, pixels, (20, 50), side=SIDE, patch=PATCH, stride=21, batch=8, fill=(1, 2, 3))
    (windows,) = seen
    assert windows[:, :, 20:].unique(dim=3).flatten(2).unique(dim=2).tolist() == [[[1], [2], [3]]] * len(windows)


def test_overlapping_windows_are_averaged() -> None:
    pixels = np.zeros((32, 53, 3), np.uint8)
    answers = iter([1.0, 4.0])

    def scores(patches: Tensor) -> Tensor:
        first = torch.tensor([next(answers) for _ in patches])
        return torch.stack([first, torch.zeros(len(patches))], 1)[:, :, None, None].expand(-1, -1, SIDE, SIDE)

    found = probabilities(scores, pixels, (32, 53), side=SIDE, patch=PATCH, stride=21, batch=8, fill=BLACK)
    logit = (found[0] / found[1]).log()
    assert logit[0, [0, 20]].tolist() == pytest.approx([1, 1], rel=1e-5)
    assert logit[0, [21, 31]].tolist() == pytest.approx([2.5, 2.5], rel=1e-5)
    assert logit[0, [32, 52]].tolist() == pytest.approx([4, 4], rel=1e-5)


def test_pixels_are_counted_by_true_and_predicted_class() -> None:
    labels = np.array([[0, 0, 1], [2, 255, 1]], np.uint8)
    likely = torch.tensor([[0, 1, 1], [2, 2, 0]])  # the class that is predicted
    found = torch.full((3, 2, 3), 0.1)
    found.scatter_(0, likely[None], 0.8)
    confusion = np.zeros((3, 3), np.int64)
    loss = _score(found, labels, confusion)
    assert confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]  # the pixel without a class counts nowhere
    assert loss == pytest.approx(-3 * math.log(0.8) - 2 * math.log(0.1))


def test_mirror_images_and_other_sizes_are_averaged_where_each_pixel_lies() -> None:
    config = BackboneConfig(width=32, depth=2, heads=2, image_size=SIDE, patch_size=PATCH)
    view = SegmentationView(config, SegmentationViewConfig())
    settings = SegmentationConfig(flip=True, scales=(1.0, 2.0))
    # Bright to the left, so that an image that was not mirrored back would show.
    pixels = np.repeat(np.linspace(200, 0, SIDE).astype(np.uint8)[None, :, None], SIDE, 0).repeat(3, 2)
    seen = []

    def scores(patches: Tensor) -> Tensor:
        seen.append(unpatched(patches))
        brightness = unpatched(patches).float()[:, :1] / 255
        return torch.cat([brightness, 1 - brightness], 1)

    once = averaged(scores, pixels, view=view, settings=settings, thoroughly=False, batch=2)
    assert len(seen) == 1
    thorough = averaged(scores, pixels, view=view, settings=settings, thoroughly=True, batch=2)
    assert any(torch.equal(windows[:1], seen[0].flip(3)) for windows in seen)
    assert torch.allclose(thorough.sum(0), torch.ones(SIDE, SIDE), atol=1e-5)
    assert torch.allclose(thorough, once, atol=0.02)  # but for the interpolation
