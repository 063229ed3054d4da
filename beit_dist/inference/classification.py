"""A model that was fine-tuned to tell classes of images apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from beit_dist.errors import ConfigError
from beit_dist.inference.inputs import AnyImages
from beit_dist.inference.model import LoadedModel
from beit_dist.inference.preparing import Preparation
from beit_dist.inference.provenance import Provenance
from beit_dist.models.classifier import ImageClassifier


class Guess(NamedTuple):
    """A class, and how likely it is."""

    name: str
    probability: float


class ClassificationModel(LoadedModel):
    """A classifier.

    Attributes:
        classes: names in the order of the outputs (K).
    """

    network: ImageClassifier

    def __init__(
        self, network: ImageClassifier, provenance: Provenance, prepare: Preparation, classes: tuple[str, ...]
    ) -> None:
        super().__init__(network, provenance, prepare)
        self.classes = classes

    def predict(self, images: AnyImages, top: int = 5) -> list[list[Guess]]:
        """The likeliest classes of each image, the likeliest first; all where there are no more than ``top``.

        Raises:
            ConfigError, DataError: as :meth:`LoadedModel.features`.
        """
        if top < 1:
            raise ConfigError("top", top, "at least 1")
        ordered = self.probabilities(images).cpu().sort(dim=1, descending=True, stable=True)
        pairs = zip(ordered.values[:, :top].tolist(), ordered.indices[:, :top].tolist(), strict=True)
        return [[Guess(self.classes[k], p) for p, k in zip(*row, strict=True)] for row in pairs]

    @torch.no_grad()
    def probabilities(self, images: AnyImages) -> Tensor:
        """fp32 (B, K), on the model's device."""
        return self.logits(images).float().softmax(1)

    def logits(self, images: AnyImages) -> Tensor:
        """(B, K) in the model's dtype, through which gradients flow."""
        found: Tensor = self.network(self.patches_of(images))
        return found
