"""Class probabilities for a whole image from windows that slide over it (mmseg ``slide_inference``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.config.finetuning import SegmentationConfig
from beit_dist.images.decoding import Pixels, patchify
from beit_dist.images.labelled.views import SegmentationView

Scores = Callable[[Tensor], Tensor]
"""From patches, uint8 (B, P, D), to logits (B, K, S, S)."""


def averaged(
    scores: Scores,
    pixels: Pixels,
    *,
    view: SegmentationView,
    settings: SegmentationConfig,
    thoroughly: bool,
    batch: int,
) -> Tensor:
    """(K, H, W): class probabilities as a run measures them.

    Args:
        scores: the model.
        pixels: a whole image, uint8 (H, W, 3).
        view: scales it.
        settings: step of the windows, scales, mirroring.
        thoroughly: with all of ``settings``' scales, and mirrored if they say so, and not once as it is.
        batch: windows at once.
    """
    scales, flips = (settings.scales, (False, True)[: 1 + settings.flip]) if thoroughly else ((1.0,), (False,))
    total: Tensor | None = None
    for scale in scales:
        for flip in flips:
            scaled = view.scaled(pixels, scale)
            found = probabilities(
                scores,
                np.ascontiguousarray(scaled[:, ::-1]) if flip else scaled,
                (pixels.shape[0], pixels.shape[1]),
                side=view.model.image_size,
                patch=view.model.patch_size,
                stride=max(1, round(settings.stride * view.model.image_size)),
                batch=batch,
                fill=view.mean_pixel,
            )
            found = found.flip(2) if flip else found
            total = found if total is None else total + found
    assert total is not None
    return total / (len(scales) * len(flips))


def probabilities(
    scores: Scores,
    pixels: Pixels,
    size: tuple[int, int],
    *,
    side: int,
    patch: int,
    stride: int,
    batch: int,
    fill: tuple[int, int, int],
) -> Tensor:
    """(K, *size): softmax of the windows' mean logits, which are enlarged to ``size`` first.

    Args:
        scores: the model.
        pixels: uint8 (H, W, 3).
        size: height and width of the result.
        side: S, of a window.
        patch: side of a patch.
        stride: between two windows; the last ones end at the edge.
        batch: windows at once.
        fill: pixel beyond the edges of an image smaller than a window.
    """
    height, width = pixels.shape[:2]
    padded = np.empty((max(height, side), max(width, side), 3), np.uint8)
    padded[:] = fill
    padded[:height, :width] = pixels
    corners = list(_corners(padded.shape[0], padded.shape[1], side, stride))
    total: Tensor | None = None
    count = torch.zeros(padded.shape[:2])
    for first in range(0, len(corners), batch):
        some = corners[first : first + batch]
        windows = [patchify(padded[y : y + side, x : x + side], patch) for y, x in some]
        logits = scores(torch.from_numpy(np.stack(windows))).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], *padded.shape[:2])
        for (y, x), window in zip(some, logits, strict=True):
            total[:, y : y + side, x : x + side] += window
            count[y : y + side, x : x + side] += 1
    assert total is not None
    mean = (total / count.to(total.device))[:, :height, :width]
    if (height, width) != size:
        mean = F.interpolate(mean[None], size=size, mode="bilinear", align_corners=False)[0]
    return mean.softmax(0)


def _corners(height: int, width: int, side: int, stride: int) -> Iterator[tuple[int, int]]:
    """Top and left of every window."""
    for y in _starts(height, side, stride):
        for x in _starts(width, side, stride):
            yield y, x


def _starts(length: int, side: int, stride: int) -> list[int]:
    count = math.ceil((length - side) / stride) + 1
    return [min(number * stride, length - side) for number in range(count)]
