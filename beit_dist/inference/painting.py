"""What a pre-trained model predicts of masked patches, as pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit_dist.images.decoding import Pixels


@dataclass(frozen=True)
class Reconstruction:
    """One image, and what a model makes of its masked patches; pictures are (height, width, 3) uint8."""

    name: str
    """The image's file name, where it has one."""
    hidden: NDArray[np.bool_]
    """(grid, grid), which patches are masked."""
    image: Pixels
    masked: Pixels
    """The image with its masked patches in grey: what the model sees."""
    painted: dict[str, Pixels]
    """What comes of the predictions, by what it is called beside its row. Empty where nothing can be painted."""
    said: str
    """How good they are, in words."""
    tokens: NDArray[np.int64] | None = None
    """(grid, grid): the likeliest visual token of each masked patch, -1 elsewhere. None: the model predicts none."""
