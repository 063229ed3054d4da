"""Semantic segmentation as a task: the class of each pixel, by UPerNet on four blocks of the backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.draws import Purpose, uniforms, words
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Described, Step, Sums
from beit_dist.errors import ConfigError
from beit_dist.images.labelled.label_maps import IGNORED, LabelMaps, class_pixels, find_label_maps
from beit_dist.images.labelled.views import SegmentationView
from beit_dist.inference.sliding import averaged
from beit_dist.models.guessing import guesses
from beit_dist.models.segmenter import ImageSegmenter, activation_bytes, head_channels, multiply_adds
from beit_dist.step_numbers import Baseline, Baselines, KnownBaselines
from beit_dist.stream.labelled.batches import LabelledBatch
from beit_dist.stream.labelled.held_out import held_out_images
from beit_dist.tasks.finetuning.numbers import SEGMENTED, numbers_of
from beit_dist.tasks.finetuning.task import Data, Finetuning

_COUNTED = 256
"""Label maps whose pixels are counted for the baselines."""
_PRINTED = 20
"""Classes whose IoU is printed at the end."""


class Rows(NamedTuple):
    """A micro-batch on the device."""

    patches: Tensor
    """uint8 (B, P, D)."""
    labels: Tensor
    """int64 (B, S, S); 255 is no class."""
    keeps: Tensor | None
    head_keeps: Tensor | None


class Segmentation(Finetuning[LabelMaps, Rows]):
    """Fine-tuning on images with label maps; recipe of unilm ``semantic_segmentation/``."""

    kind = "segmentation"
    measured = SEGMENTED
    shown = (*Finetuning.shown, "micro_batch")  # batch normalisation is over the micro-batches of all ranks

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config)
        self.numbers = numbers_of(config)
        self._ious: Mapping[str, float] | None = None

    def find(self) -> Data[LabelMaps]:
        """Images with label maps beside them."""
        config, access = self.config, self.config.storage.access
        training = find_label_maps(config.data or (), access, config.maps, left_out=self.left_out)
        if (where := config.validation.data) is None:
            return Data(training, None)
        classes, field = training.classes, "validation.data"
        return Data(training, find_label_maps(where, access, config.maps, classes=classes, field=field))

    @cached_property
    def view(self) -> SegmentationView:
        """Random crops of scaled images."""
        return SegmentationView(self.config.model, self.config.views)

    def check(self, ranks: Ranks) -> None:
        """Find the images."""
        rows = min(self.config.micro_batch, self.config.global_batch // ranks.world)
        if rows * ranks.world < 2:
            raise ConfigError(
                "micro_batch", self.config.micro_batch, "at least 2 images over all ranks, for batch normalisation"
            )
        super().check(ranks)

    def network(self) -> ImageSegmenter:
        """Backbone, pyramid and both heads."""
        return self._network(None)

    def model(self) -> nn.Module:
        """The network, initialised from the seed; batch normalisation is over all ranks."""
        together = dist.group.WORLD if self._around.ranks.world > 1 else None
        model = self._network(together)
        model.initialise(self.config.seed)
        return model

    def describe_model(self, resolved: Resolved) -> Described:
        """Sizes, input and objective."""
        yield from super().describe_model(resolved)
        taps = ", ".join(str(block + 1) for block in self.network().taps)
        yield "target", f"the class of each pixel; UPerNet on blocks {taps}, batch normalisation over all ranks"

    @property
    def multiply_adds(self) -> int:
        """Of one window."""
        return multiply_adds(self.config.model, len(self.classes))

    def activation_bytes(self, resolved: Resolved) -> int:
        """Of blocks, pyramid and heads, and of the logits in fp32."""
        config, size = self.config, 4 if resolved.precision == "fp32" else 2
        kept = activation_bytes(config.model, len(self.classes), size, config.activation_checkpointing)
        logits = 2 * 8 * len(self.classes) * config.model.image_size**2
        return resolved.micro_batch * (kept + logits)

    # ------------------------------------------------------------------------------------------------- the steps

    def weight(self, batch: LabelledBatch) -> int:
        """The number of labelled pixels."""
        return int((batch.labels != IGNORED).sum())

    def rows(self, batch: LabelledBatch) -> Iterator[Rows]:
        """Micro-batches, with the channels that each head's dropout keeps."""
        around = self._around
        for low in range(0, around.resolved.rank_batch, around.resolved.micro_batch):
            rows, keeps = self.part(batch, low)
            patches, labels = (
                tensor[rows].to(around.device, non_blocking=True) for tensor in (batch.patches, batch.labels)
            )
            yield Rows(patches, labels.long(), keeps, self._head_keeps(batch, rows))

    def forward(self, rows: Rows, step: Step) -> Sums:
        """Cross-entropy of both heads."""
        logits, auxiliary = self._running.engine(rows.patches, rows.keeps, rows.head_keeps)
        labels = rows.labels.flatten()
        losses = [  # of rows: on CUDA, that of maps has no deterministic gradient
            F.cross_entropy(_by_pixel(each), labels, ignore_index=IGNORED, reduction="sum")
            for each in (logits, auxiliary)
        ]
        loss = losses[0] + self.config.segmentation.auxiliary_weight * losses[1]
        return Sums(loss, [loss, (logits.argmax(1) == rows.labels).sum()])

    def baselines(self) -> KnownBaselines:
        """From how many pixels each class has, in some of the label maps."""
        access = self.config.storage.access
        known = class_pixels(self.data.training, access, _COUNTED)
        weight = 1 + self.config.segmentation.auxiliary_weight  # the auxiliary head answers alike
        trained = _without_top5(guesses(known, None, "class", "classes"))
        training = {
            **trained,
            "loss": [Baseline(one.name, weight * one.value) for one in trained["loss"]],
        }
        if self.data.held_out is None:
            return KnownBaselines(training)
        scored = class_pixels(self.data.held_out, access, _COUNTED)
        held_out = _without_top5(guesses(known, scored, "class", "classes"))
        if "accuracy" in held_out:
            (commonest,) = held_out["accuracy"]
            held_out["mean_iou"] = [commonest._replace(value=commonest.value / max(1, int((scored > 0).sum())))]
        return KnownBaselines(training, held_out)

    @torch.no_grad()
    def evaluate(self, step: int) -> Mapping[str, Any] | None:
        """Loss, accuracy and IoU of whole held-out images."""
        around, config = self._around, self.config
        assert self.data.held_out is not None
        classes, samples = len(self.classes), self.measured_samples()
        confusion, loss = np.zeros((classes, classes), np.int64), 0.0
        images = held_out_images(
            self.data.held_out,
            self.view,
            rank=around.ranks.rank,
            world=around.ranks.world,
            samples=samples,
            loader=config.loader,
            access=config.storage.access,
        )
        with self._measured_model.now() as model:
            for image in images:
                if any(around.agreement.gather(around.stop.requested)):
                    return None
                around.alive()
                if image is not None:
                    found = averaged(
                        lambda patches: model(patches.to(around.device))[0],
                        image.pixels,
                        view=self.view,
                        settings=config.segmentation,
                        thoroughly=samples is None,
                        batch=around.resolved.micro_batch,
                    )
                    loss += _score(found, image.labels, confusion)
        everyone = around.agreement.gather((loss, confusion))
        confusion = sum((theirs for _, theirs in everyone), np.zeros_like(confusion))
        return self._numbers(confusion, sum(theirs for theirs, _ in everyone))

    def conclude(self) -> Mapping[str, Any]:
        """Say how well each class was found."""
        if self._ious and self._around.ranks.rank == 0:
            ordered = sorted(self._ious.items(), key=lambda found: -found[1])
            more = len(ordered) - _PRINTED
            listed = ", ".join(f"{name} {value:.1%}" for name, value in ordered[:_PRINTED])
            print(f"IoU: {listed}" + (f"; {more} more in validation.jsonl" if more > 0 else ""), flush=True)
        return {}

    def _network(self, group: Any) -> ImageSegmenter:
        config = self.config
        return ImageSegmenter(
            config.model,
            len(self.classes),
            recompute=config.activation_checkpointing,
            head_dropout=config.segmentation.dropout,
            group=group,
        )

    def _head_keeps(self, batch: LabelledBatch, rows: slice) -> Tensor | None:
        """(B, channels) float: 1 where dropout keeps a channel."""
        config, rate = self.config, self.config.segmentation.dropout
        if not rate:
            return None
        keys = zip(batch.epochs[rows].tolist(), batch.samples[rows].tolist(), strict=True)
        channels = head_channels(config.model)
        kept = [uniforms(words(config.seed, Purpose.HEAD_DROPOUT, key, channels)) >= rate for key in keys]
        keeps = torch.from_numpy(np.stack(kept)).to(self._around.device, non_blocking=True)
        return keeps.to(next(self._running.engine.module.parameters()).dtype)

    def _numbers(self, confusion: NDArray[np.int64], loss: float) -> dict[str, Any]:
        """From pixels by true and predicted class, and the sum of their losses."""
        pixels, right = int(confusion.sum()), np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - right
        there = union > 0
        ious = right[there] / union[there]
        named = zip(np.array(self.classes, object)[there].tolist(), ious.tolist(), strict=True)
        self._ious = dict(named)
        return {
            "loss": loss / max(1, pixels),
            "accuracy": float(right.sum() / max(1, pixels)),
            "mean_iou": float(ious.mean()) if len(ious) else 0.0,
            "iou": {name: round(value, 6) for name, value in self._ious.items()},
            "pixels": pixels,
        }


def _by_pixel(logits: Tensor) -> Tensor:
    """(B, K, S, S) to fp32 (B · S · S, K)."""
    return logits.permute(0, 2, 3, 1).float().flatten(0, 2)


def _score(found: Tensor, labels: NDArray[np.uint8], confusion: NDArray[np.int64]) -> float:
    """Add an image's pixels to ``confusion`` (true, predicted); the sum of their cross-entropies."""
    truth = torch.from_numpy(labels).to(found.device)
    there = truth != IGNORED
    wanted = truth[there].long()
    likely = found[:, there]
    guessed = likely.argmax(0)
    classes = len(confusion)
    counts = torch.bincount(wanted * classes + guessed, minlength=classes**2)
    confusion += counts.view(classes, classes).cpu().numpy()
    own = likely.gather(0, wanted[None]).clamp(min=torch.finfo(torch.float32).tiny)
    return -float(own.log().double().sum())


def _without_top5(found: Baselines) -> dict[str, Sequence[Baseline]]:
    return {name: baselines for name, baselines in found.items() if name != "top5_accuracy"}
