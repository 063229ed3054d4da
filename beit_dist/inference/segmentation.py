"""A model that was fine-tuned to tell the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from beit_dist.images.decoding import Pixels
from beit_dist.inference.model import AnyImages, LoadedModel


@dataclass(frozen=True)
class Segments:
    """The classes of an image's pixels, at its own size (H, W)."""

    labels: Pixels
    """uint8 (H, W): numbers in ``classes``."""
    classes: tuple[str, ...]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that is there, the largest first."""
        raise NotImplementedError


class SegmentationModel(LoadedModel):
    """Attributes: ``classes``, their names in the order of the outputs (K)."""

    classes: tuple[str, ...]

    def predict(self, images: AnyImages, *, thoroughly: bool = True) -> list[Segments]:
        """The likeliest class of each pixel of each image, by windows that slide over it as the run measures.

        Args:
            images: whole images of any size, or uint8 tensors (H, W, 3); or normalised tensors (B, 3, S, S).
            thoroughly: at the scales, and mirrored, as the run's recipe has it for its last measurement.
        """
        raise NotImplementedError

    def probabilities(self, images: AnyImages, *, thoroughly: bool = True) -> Iterator[Tensor]:
        """fp32 (K, H, W) of one image after the other, on the model's device: 4 · K bytes a pixel."""
        raise NotImplementedError
