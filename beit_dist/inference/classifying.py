"""``beit predict`` for a classification: the likeliest classes of images, with their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from beit_dist.images.decoding import Pixels
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.formats.table import Column
from beit_dist.inference.job import Work
from beit_dist.inference.likelihoods import PROBABILITY, ranked_columns, ranked_values


class Classifying(Work[Pixels]):
    """``class_1``, ``probability_1`` and so on.

    Args:
        model: what tells the classes.
        top: how many are told, at most.
    """

    made: ClassVar[str] = "predictions"
    layers = 1

    def __init__(self, model: ClassificationModel, top: int) -> None:
        super().__init__(model)
        self.classes, self.width = model.classes, len(model.classes)
        self.top = min(top, self.width)
        self._tell = model.probabilities

    @property
    def facts(self) -> dict[str, Any]:
        share = self.model.prepare.augmentation.evaluated_share(self.model.prepare.config.image_size)
        return {"classes": list(self.classes), "top": self.top, "crop": share}

    def prepare(self, image: Image.Image) -> Pixels:
        return self.model.prepare(image)

    @torch.no_grad()
    def make(self, prepared: Sequence[Pixels], numbers: Sequence[int] | None = None) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._tell(torch.from_numpy(np.stack(prepared))).float().cpu().numpy()
        return found[None]

    def columns(self) -> tuple[Column, ...]:
        return ranked_columns(self.top, PROBABILITY)

    def values(self, read: Callable[[int], NDArray[np.float32]]) -> Mapping[str, Callable[[], Any]]:
        return ranked_values(lambda: read(0), self.classes, self.top, PROBABILITY)
