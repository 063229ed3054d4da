"""The trained models of the page's runs, each loaded once, and held-out images as they look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.errors import ConfigError
from beit_dist.images.labelled.images import LabelledImages, find_labelled
from beit_dist.images.labelled.label_maps import LabelMaps, find_label_maps
from beit_dist.images.labelled.reading import read_image
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.loading import load
from beit_dist.inference.pretrained import PretrainedModel
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.reports.drawing import Wishes
from beit_dist.reports.html.embedded import Pixels
from beit_dist.reports.html.subject import Subject
from beit_dist.reports.samples import read_spread
from beit_dist.reports.sources import open_images
from beit_dist.storage.access import Access
from beit_dist.stream.labelled.held_out import measured

_KEPT = 4
"""Models that are in memory at once."""
AnyModel = PretrainedModel | ClassificationModel | SegmentationModel


class Seen(NamedTuple):
    """An image as a model looks at it."""

    name: str
    pixels: Pixels
    """uint8 (S, S, 3)"""


@dataclass(frozen=True)
class Models:
    """Loads the models of runs.

    Args:
        wishes: which weights, and on which device.
        access: how URLs are reached.
    """

    wishes: Wishes
    access: Access
    _loaded: dict[int, AnyModel] = field(default_factory=dict)
    _labelled: dict[int, LabelledImages] = field(default_factory=dict)

    def of(self, run: Subject) -> AnyModel:
        """The model of a run, on the device.

        Raises:
            UserError: there is no whole checkpoint.
        """
        if run.number not in self._loaded:
            while len(self._loaded) >= _KEPT:
                del self._loaded[next(iter(self._loaded))]
            ema = self.wishes.ema or _measures_average(run)
            self._loaded[run.number] = load(str(run.named), ema=ema, device=self.wishes.device, access=self.access)
        return self._loaded[run.number]

    def images(self, run: Subject, count: int) -> list[Seen]:
        """Held-out images, spread evenly over all.

        Raises:
            UserError: there are none, or they are gone.
        """
        if isinstance(run.config, PretrainingConfig):
            dataset = str(run.facts.get("dataset", ""))
            images = open_images(self.wishes.data, run.config, dataset)
            found = read_spread(images.place, images.manifest, count)
            return [Seen(sample.source, sample.image) for sample in found]
        model = self.of(run)
        listed: LabelledImages | LabelMaps
        if isinstance(model, ClassificationModel):
            listed = self.labelled(run, model.classes)
        elif isinstance(model, SegmentationModel):
            listed = self.label_maps(run, model.classes)
        else:
            raise ConfigError("RUN", run.state.kind, "a run of a BEiT")
        rows = measured(len(listed), count)
        return [
            Seen(listed.files[row].name, model.prepare(read_image(listed.files[row], self.access))) for row in rows
        ]

    def labelled(self, run: Subject, classes: Sequence[str]) -> LabelledImages:
        """The held-out images of a classification; raises what :meth:`images` does."""
        if run.number not in self._labelled:
            where = self._held_out(run)
            found = find_labelled(where, self.access, classes=classes, field="validation.data")
            self._labelled[run.number] = found
        return self._labelled[run.number]

    def label_maps(self, run: Subject, classes: Sequence[str]) -> LabelMaps:
        """The held-out images of a segmentation; raises what :meth:`images` does."""
        where = self._held_out(run)
        assert isinstance(run.config, FinetuningConfig)
        maps = run.config.maps
        return find_label_maps(where, self.access, maps, classes=classes, field="validation.data")

    def _held_out(self, run: Subject) -> str | tuple[str, ...]:
        config = run.config
        where = self.wishes.data or (config.validation.data if config else None)
        if where is None:
            raise ConfigError(
                "validation.data", None, "held-out images", "Name some with --data, of the same classes."
            )
        return where


def _measures_average(run: Subject) -> bool:
    """A fine-tuning that keeps averaged weights measures these, so pictures beside its numbers are theirs."""
    return isinstance(run.config, FinetuningConfig) and run.config.ema.decay is not None


def batches(images: Sequence[Pixels], size: int) -> Iterator[torch.Tensor]:
    """uint8 (B, S, S, 3) of up to ``size`` images at once."""
    for first in range(0, len(images), size):
        yield torch.from_numpy(np.stack(images[first : first + size]))
