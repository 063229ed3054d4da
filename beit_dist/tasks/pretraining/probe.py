"""A probe of a run that trains: what its features are worth for a classification, every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from beit_dist.config.labelled import AugmentationConfig, LabelledLoaderConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.task import Surroundings
from beit_dist.errors import UserError
from beit_dist.images.labelled.images import find_labelled
from beit_dist.images.labelled.views import ClassificationView
from beit_dist.probing.features import features_of, frozen, layers_of, quarters
from beit_dist.probing.pictures import Pictures, pictures_of
from beit_dist.probing.scores import LayerScores, best_knn, best_linear, scores_of
from beit_dist.step_numbers import Baseline, KnownBaselines, Number
from beit_dist.stream.labelled.held_out import held_out_batches
from beit_dist.tasks.pretraining import dataset

FIELD = "validation.probe"
_HELP = "Share of labelled images that {} gets right, from frozen features of the best layer (validation.probe)."
PROBED = (
    Number(
        name="probe_linear",
        help=_HELP.format("a linear classifier"),
        held_out="beit_validation_probe_linear_accuracy_ratio",
        text="linear probe {:.1%}",
        better="higher",
    ),
    Number(
        name="probe_knn",
        help=_HELP.format("a vote of 20 neighbours"),
        held_out="beit_validation_probe_knn_accuracy_ratio",
        text="k-NN probe {:.1%}",
        better="higher",
    ),
)


def probed(config: PretrainingConfig) -> tuple[Number, ...]:
    """What is measured besides the head's numbers."""
    return PROBED if config.validation.probe.data is not None else ()


def open_probe(config: PretrainingConfig) -> Pictures | None:
    """The images of ``validation.probe``; None if nothing is probed.

    Raises:
        ConfigError: they are too few or of one class, or there is no such layer.
        DataError: a source is damaged, or has no labels.
    """
    probe = config.validation.probe
    if probe.data is None:
        return None
    probed_layers(config)
    field = f"{FIELD}.data"
    return pictures_of(find_labelled(probe.data, config.storage.access, field=field), None, probe.samples, field)


def probed_layers(config: PretrainingConfig) -> tuple[int, ...]:
    """The layers that are probed.

    Raises:
        ConfigError: there is no such layer.
    """
    depth, chosen = config.model.depth, config.validation.probe.layers
    return layers_of(depth, chosen or quarters(depth), f"{FIELD}.layers")


def probe_row(config: PretrainingConfig, pictures: Pictures, steps: int) -> tuple[str, str]:
    """What is probed with, and when, for a run of so many steps."""
    split, layers = pictures.split, ", ".join(map(str, probed_layers(config)))
    what = f"{len(split.training):,} images to fit to, {len(split.test):,} to test on"
    classes, every = len(pictures.images.classes), config.probed_every(steps)
    return (
        "probe",
        f"{config.validation.probe.data}: {what}, {classes:,} classes; layers {layers}, every {every:,} steps",
    )


def beside(known: KnownBaselines, pictures: Pictures | None) -> KnownBaselines:
    """Baselines, and what the probes' numbers come to without any features."""
    if pictures is None:
        return known
    commonest = {number.name: [Baseline("commonest class", pictures.baseline)] for number in PROBED}
    return known._replace(held_out={**known.held_out, **commonest})


def baselines_of(config: PretrainingConfig) -> KnownBaselines:
    """All baselines of a run, from its recipe alone, whose data need not be there any more."""
    try:
        pictures = open_probe(config)
    except UserError:
        pictures = None
    return beside(dataset.baselines_of(config), pictures)


class Probe:
    """Probes the model's features; the same numbers on any number of ranks, but for rounding.

    The weights are copied out of the engine, whatever its ZeRO stage, and a backbone of its own is made of them:
    nothing is drawn, and nothing of the training is touched.

    Args:
        config: the recipe.
        pictures: from :func:`open_probe`.
        around: ranks and device.
    """

    def __init__(self, config: PretrainingConfig, pictures: Pictures, around: Surroundings) -> None:
        self._config, self._pictures, self._around = config, pictures, around
        self._layers = probed_layers(config)

    @torch.no_grad()
    def measure(self, weights: Callable[[], Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """The probes' numbers now; None when a rank was asked to stop. Collective.

        Args:
            weights: gives the whole fp32 weights on every rank.

        Raises:
            DataError: an image cannot be used.
        """
        found = self._features(weights())
        if found is None:
            return None
        scores = self._scores(*found)
        return {
            "probe_linear": best_linear(scores).linear.test,
            "probe_knn": best_knn(scores).knn.test,
            "probe_layers": [each.facts() for each in scores],
        }

    def _features(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """This rank's images: their numbers (n,), and features (L, n, D) on the CPU."""
        around, config = self._around, self._config
        backbone = frozen(config.model, weights, around.device)
        batches = held_out_batches(
            self._pictures.images,
            ClassificationView(config.model, AugmentationConfig()),
            rank=around.ranks.rank,
            world=around.ranks.world,
            samples=None,
            batch=around.resolved.micro_batch,
            loader=LabelledLoaderConfig(workers=config.validation.probe.workers),
            access=config.storage.access,
        )
        numbers, features = [], []
        for batch in batches:
            if any(around.agreement.gather(around.stop.requested)):
                return None
            around.alive()
            there = batch.samples >= 0
            made = features_of(backbone, batch.patches.to(around.device), self._layers)
            numbers.append(batch.samples[there].clone())
            features.append(made.cpu()[:, there])
        return torch.cat(numbers), torch.cat(features, 1)

    def _scores(self, numbers: Tensor, features: Tensor) -> list[LayerScores]:
        """What each layer is worth; ranks take turns of a layer."""
        around, images = self._around, self._pictures.images
        rank, world = around.ranks.rank, around.ranks.world
        own: list[tuple[int, Tensor]] = []
        for place, layer in enumerate(self._layers):
            gathered = around.agreement.gather((numbers, features[place]))
            if place % world == rank:
                whole = torch.empty(len(images), features.shape[-1])
                for rows, values in gathered:
                    whole[rows] = values
                own.append((layer, whole))
        scores = []
        for layer, whole in own:
            around.alive()
            on_device = whole.to(around.device)
            scores.append(scores_of(layer, on_device, images.labels, self._pictures.split, len(images.classes)))
        found = [score for each in around.agreement.gather(scores) for score in each]
        return sorted(found, key=lambda score: score.layer)
