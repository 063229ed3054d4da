"""A model that was fine-tuned to tell the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from beit_dist.config.finetuning import SegmentationConfig
from beit_dist.config.labelled import SegmentationViewConfig
from beit_dist.errors import ConfigError
from beit_dist.images.decoding import Pixels
from beit_dist.images.labelled.views import SegmentationView
from beit_dist.inference.inputs import AnyImages, collected
from beit_dist.inference.model import LoadedModel
from beit_dist.inference.preparing import Preparation
from beit_dist.inference.provenance import Provenance
from beit_dist.inference.sliding import averaged
from beit_dist.models.segmenter import ImageSegmenter

_WINDOWS = 8
"""That are run at once."""


@dataclass(frozen=True)
class Segments:
    """The classes of an image's pixels, at its own size (H, W)."""

    labels: Pixels
    """uint8 (H, W): numbers in ``classes``."""
    classes: tuple[str, ...]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that is there, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        there = sorted(np.flatnonzero(counts).tolist(), key=lambda number: -int(counts[number]))
        return {self.classes[number]: float(counts[number] / self.labels.size) for number in there}


class SegmentationModel(LoadedModel):
    """A segmenter.

    Attributes:
        classes: names in the order of the outputs (K).
        views: how a whole image is scaled.
        settings: step of the windows; scales and mirroring of a thorough prediction.
    """

    network: ImageSegmenter

    def __init__(
        self,
        network: ImageSegmenter,
        provenance: Provenance,
        prepare: Preparation,
        classes: tuple[str, ...],
        views: SegmentationViewConfig,
        settings: SegmentationConfig,
    ) -> None:
        super().__init__(network, provenance, prepare)
        self.classes, self.views, self.settings = classes, views, settings

    def predict(self, images: AnyImages, *, thoroughly: bool = True) -> list[Segments]:
        """The likeliest class of each pixel of each image, by windows that slide over it as the run measures.

        Args:
            images: whole images of any size, or uint8 tensors (H, W, 3); or normalised tensors (B, 3, S, S), each
                of which is one window.
            thoroughly: at the scales, and mirrored, as the run's recipe has it for its last measurement.

        Raises:
            ConfigError, DataError: as :meth:`LoadedModel.features`.
        """
        found = self.probabilities(images, thoroughly=thoroughly)
        return [Segments(one.argmax(0).to(torch.uint8).cpu().numpy(), self.classes) for one in found]

    def probabilities(self, images: AnyImages, *, thoroughly: bool = True) -> Iterator[Tensor]:
        """fp32 (K, H, W) of one image after the other, on the model's device: 4 · K bytes a pixel.

        Arguments and errors are those of :meth:`predict`.
        """
        given = collected(images)
        if isinstance(given, Tensor) and given.dtype != torch.uint8:
            for one in given if given.dim() == 4 and len(given) else [given]:
                yield self._scores(self.patches_of(one))[0].float().softmax(0)
            return
        whole = _arrays(given) if isinstance(given, Tensor) else (self.prepare.whole(image) for image in given)
        view = SegmentationView(self.config, self.views)
        for pixels in whole:
            with torch.no_grad():
                found = averaged(
                    self._scores,
                    pixels,
                    view=view,
                    settings=self.settings,
                    thoroughly=thoroughly,
                    batch=_WINDOWS,
                )
            yield found

    @torch.no_grad()
    def _scores(self, patches: Tensor) -> Tensor:
        logits: Tensor = self.network(patches.to(self.device))[0]
        return logits


def _arrays(images: Tensor) -> Iterator[Pixels]:
    """Whole images, uint8 (B, H, W, 3) or (B, 3, H, W), as arrays (H, W, 3)."""
    if images.dim() == 4 and images.shape[3] != 3 and images.shape[1] == 3:
        images = images.permute(0, 2, 3, 1)
    if images.dim() != 4 or images.shape[3] != 3 or not images.numel():
        raise ConfigError("images", f"a uint8 tensor {tuple(images.shape)}", "uint8 (H, W, 3) or (B, H, W, 3)")
    return (np.ascontiguousarray(image) for image in images.cpu().numpy())
