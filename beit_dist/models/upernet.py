"""The heads of semantic segmentation: UPerNet (arXiv 1807.10221), and the FCN that helps it to learn.

As in mmsegmentation 0.11, which the original trains them with (unilm ``upernet_beit.py``); modules have its names.

Shapes: B images, C channels of every feature map, K classes; the four maps are the larger the earlier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit_dist.models.batch_norm import BatchNorm

POOL_SCALES = (1, 2, 3, 6)
"""Cells along a side of the maps that the last one is pooled to (mmsegmentation ``pool_scales``)."""


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; the map keeps its size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = BatchNorm(outputs, group)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, height, width) to (B, outputs, height, width)."""
        return F.relu(self.bn(self.conv(x)))


class AveragePool(nn.Module):
    """Means of ``scale`` × ``scale`` cells of a map, which overlap where its side is no multiple.

    PyTorch's ``AdaptiveAvgPool2d`` gives the same, but on CUDA its gradient has no deterministic form.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) to (B, C, scale, scale)."""
        for axis in (2, 3):
            size = x.shape[axis]
            edges = [(i * size // self.scale, -(-(i + 1) * size // self.scale)) for i in range(self.scale)]
            x = torch.stack([x.narrow(axis, low, high - low).mean(axis) for low, high in edges], axis)
        return x


class UPerHead(nn.Module):
    """Pools the last map, adds it to the others from the coarsest to the finest, and classifies all four together.

    Args:
        width: C, and the channels inside.
        classes: K.
        group: see :class:`BatchNorm`.
    """

    def __init__(self, width: int, classes: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AveragePool(scale), Convolution(width, width, 1, group)) for scale in POOL_SCALES
        )
        self.bottleneck = Convolution((1 + len(POOL_SCALES)) * width, width, 3, group)
        self.lateral_convs = nn.ModuleList(Convolution(width, width, 1, group) for _ in range(3))
        self.fpn_convs = nn.ModuleList(Convolution(width, width, 3, group) for _ in range(3))
        self.fpn_bottleneck = Convolution(4 * width, width, 3, group)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], factors: Tensor | None = None) -> Tensor:
        """Logits (B, K, height, width) of the first map's size; ``factors`` (B, C) are those of dropout."""
        coarsest = maps[-1]
        pooled = [resized(module(coarsest), coarsest.shape[-2:]) for module in self.psp_modules]
        summed = [self.bottleneck(torch.cat((coarsest, *pooled), 1))]
        for lateral, finer in zip(reversed(self.lateral_convs), reversed(maps[:-1]), strict=True):
            summed.append(lateral(finer) + resized(summed[-1], finer.shape[-2:]))
        coarsest, *finer_ones = summed
        found = [convolve(x) for convolve, x in zip(self.fpn_convs, reversed(finer_ones), strict=True)]
        together = torch.cat([resized(x, maps[0].shape[-2:]) for x in (*found, coarsest)], 1)
        return _classified(self.fpn_bottleneck(together), factors, self.conv_seg)


class FCNHead(nn.Module):
    """One convolution and a classifier, on one map: for training only.

    Args:
        inputs: C.
        width: channels inside.
        classes: K.
        group: see :class:`BatchNorm`.
    """

    def __init__(self, inputs: int, width: int, classes: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList([Convolution(inputs, width, 3, group)])
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """(B, C, height, width) to logits (B, K, height, width); ``factors`` (B, width) are those of dropout."""
        for convolve in self.convs:
            x = convolve(x)
        return _classified(x, factors, self.conv_seg)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps or logits (B, C, height, width) at another size, bilinearly between the centres of cells."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def head_deviation(shape: Sequence[int], *, classifies: bool) -> float:
    """Deviation of the normal distribution that a head's convolution (O, I, height, width) starts with.

    mmsegmentation's ``init_weights``: 0.01 for what classifies, else Kaiming's by the fan out.
    """
    return 0.01 if classifies else math.sqrt(2 / (shape[0] * math.prod(shape[2:])))


def _classified(x: Tensor, factors: Tensor | None, classifier: nn.Module) -> Tensor:
    """Logits of a map, of which dropout takes whole channels of an image."""
    logits: Tensor = classifier(x if factors is None else x * factors[:, :, None, None].to(x.dtype))
    return logits
