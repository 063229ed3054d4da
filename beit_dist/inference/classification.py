"""A model that was fine-tuned to tell classes of images apart."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from beit_dist.inference.model import AnyImages, LoadedModel


class Guess(NamedTuple):
    """A class, and how likely it is."""

    name: str
    probability: float


class ClassificationModel(LoadedModel):
    """Attributes: ``classes``, their names in the order of the outputs (K)."""

    classes: tuple[str, ...]

    def predict(self, images: AnyImages, top: int = 5) -> list[list[Guess]]:
        """The likeliest classes of each image, the likeliest first; all where there are no more than ``top``."""
        raise NotImplementedError

    def probabilities(self, images: AnyImages) -> Tensor:
        """fp32 (B, K), on the model's device."""
        raise NotImplementedError

    def logits(self, images: AnyImages) -> Tensor:
        """(B, K) in the model's dtype, through which gradients flow."""
        raise NotImplementedError
