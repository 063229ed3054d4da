"""What drawings of single colours come to: the baselines for the PSNR of a tokenizer.

Both paint each square of 8×8 pixels, which has one token, in one colour. A tokenizer whose reconstructions are no
better than the palette's could be replaced by a table of colours: its tokens say nothing of shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.models.clusters import k_means, nearest
from beit_dist.models.dvae import STRIDE
from beit_dist.models.dvae_objective import psnr
from beit_dist.models.verdict import SingleColours

_MOST_COLOURS = 1 << 14
"""Of training images, that the palette is made from."""


def single_colours(training: Tensor, measured: Tensor, vocabulary: int) -> SingleColours:
    """The baselines on uint8 images ``measured`` ``(N, 3, H, W)``, whose sides are multiples of 8.

    Args:
        training: other images, of any number and size, that the palette is made from.
        vocabulary: colours of the palette.
    """
    colours = _mean_colours(training)
    order = torch.randperm(len(colours), generator=torch.Generator().manual_seed(0))
    palette = k_means(colours[order[:_MOST_COLOURS]], vocabulary)
    exact = _mean_colours(measured)
    painted = palette[nearest(exact, palette)]
    # The error of a square is that of its mean colour, and what the mean cannot say.
    total = measured.double().square().mean() / 255**2
    within = float(total - exact.double().square().mean())
    between = float((exact.double() - painted.double()).square().mean())
    return SingleColours(psnr(within + between), psnr(within))


def _mean_colours(images: Tensor) -> Tensor:
    """float32 ``(N · H/8 · W/8, 3)`` in [0, 1]."""
    means = [F.avg_pool2d(some.float() / 255, STRIDE) for some in torch.split(images, 32)]
    return torch.cat(means).permute(0, 2, 3, 1).reshape(-1, 3)
