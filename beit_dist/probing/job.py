"""``beit probe``: features of labelled images into files, on any number of ranks, then probes of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beit_dist.config.labelled import AugmentationConfig, LabelledLoaderConfig
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.errors import DataError
from beit_dist.images.labelled.views import ClassificationView
from beit_dist.probing.features import features_of, frozen, width_of
from beit_dist.probing.origin import Origin
from beit_dist.probing.parts import Parts
from beit_dist.probing.pictures import Pictures, taken
from beit_dist.probing.room import check_room
from beit_dist.probing.scores import LayerScores, best_knn, best_linear, scores_of
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.stream.labelled.held_out import HeldOutBatch, held_out_batches

PART_BATCHES = 16
"""Batches of a part: what a restart does at most again, on each rank."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Job:
    """A probe of a backbone.

    Args:
        origin: the backbone.
        pictures: what it is probed with.
        layers: to look at, ascending.
        out: a folder that all ranks reach.
        batch: images at once.
        loader: how they are read.
        access: how URLs are reached.
    """

    origin: Origin
    pictures: Pictures
    layers: tuple[int, ...]
    out: Place
    batch: int
    loader: LabelledLoaderConfig
    access: Access

    @property
    def view(self) -> ClassificationView:
        """How an image is looked at: as where a classification is evaluated."""
        return ClassificationView(self.origin.config, AugmentationConfig())

    @property
    def parts(self) -> Parts:
        """Where the features are kept."""
        share = AugmentationConfig().evaluated_share(self.origin.config.image_size)
        facts = {**self.origin.facts(), "layers": self.layers, "images": self.pictures.digest, "crop": share}
        return Parts(
            self.out,
            facts | {"training": len(self.pictures.split.training)},
            images=len(self.pictures.images),
            size=PART_BATCHES * self.batch,
            layers=len(self.layers),
            width=width_of(self.origin.config),
        )

    def check_space(self) -> None:
        """Refuse a local disk without room for the features.

        Raises:
            SpaceError: it has too little.
        """
        parts = self.parts
        check_room(
            self.out,
            sum(map(parts.bytes_of, parts.missing())),
            f"the features of {parts.images:,} images in {parts.layers} layers. Free some, or ask for fewer "
            "--layers or --samples.",
        )

    def run(self, agreement: Agreement, device: torch.device, progress: Progress) -> list[LayerScores]:
        """Make the features that are not there yet, and probe each layer; the same on every rank. Collective.

        Args:
            agreement: the ranks.
            device: this rank's.
            progress: called with the number of images just looked at, by this rank.

        Raises:
            DataError: the ranks see different images or weights, or an image cannot be used.
        """
        rank, world, parts = agreement.ranks.rank, agreement.ranks.world, self.parts
        if len(set(agreement.gather(parts.place.name))) > 1:
            raise DataError(
                "the ranks see different images or weights. Copy the images to every host; of a run that is still "
                "training, name a step folder"
            )
        missing = agreement.from_rank_0(parts.missing())
        self._make(parts, missing[rank::world], device, progress)
        agreement.gather(None)  # all parts are there
        labels, split = self.pictures.images.labels, self.pictures.split
        classes = len(self.pictures.images.classes)
        own = [
            scores_of(self.layers[place], parts.layer(place).to(device), labels, split, classes)
            for place in range(rank, len(self.layers), world)
        ]
        found = [scores for each in agreement.gather(own) for scores in each]
        return sorted(found, key=lambda scores: scores.layer)

    def _make(self, parts: Parts, missing: Sequence[int], device: torch.device, progress: Progress) -> None:
        if not missing:
            return
        backbone = frozen(self.origin.config, self.origin.weights, device)
        rows = [row for part in missing for row in parts.rows(part)]
        batches = self._batches(rows)
        for part in missing:  # all are whole numbers of batches, but the last one of all
            left, made = len(parts.rows(part)), []
            while left > 0:
                batch = next(batches)
                made.append(features_of(backbone, batch.patches.to(device), self.layers)[:, :left].cpu())
                progress(made[-1].shape[1])
                left -= made[-1].shape[1]
            parts.write(part, torch.cat(made, 1))

    def _batches(self, rows: Sequence[int]) -> Iterator[HeldOutBatch]:
        return held_out_batches(
            taken(self.pictures.images, rows),
            self.view,
            rank=0,
            world=1,
            samples=None,
            batch=self.batch,
            loader=self.loader,
            access=self.access,
        )


def result_of(job: Job, scores: Sequence[LayerScores]) -> dict[str, Any]:
    """What was found, as JSON takes it."""
    split = job.pictures.split
    return {
        "model": job.origin.name,
        "weights": job.origin.digest,
        "classes": len(job.pictures.images.classes),
        "images": {name: len(rows) for name, rows in split._asdict().items()},
        "commonest_class": job.pictures.baseline,
        "linear": {"layer": best_linear(scores).layer, "accuracy": best_linear(scores).linear.test},
        "knn": {"layer": best_knn(scores).layer, "accuracy": best_knn(scores).knn.test},
        "layers": [each.facts() for each in scores],
    }
