"""Classification as a task: the class of each image, from the mean of its patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Described, Step, Sums
from beit_dist.images.labelled.images import LabelledImages, find_labelled
from beit_dist.images.labelled.views import ClassificationView
from beit_dist.models.activations import backbone_activation_bytes
from beit_dist.models.classifier import ImageClassifier, multiply_adds
from beit_dist.models.guessing import Counts, guesses
from beit_dist.models.unfilled import unfilled
from beit_dist.step_numbers import Baselines, KnownBaselines
from beit_dist.stream.labelled.batches import LabelledBatch
from beit_dist.stream.labelled.held_out import held_out_batches
from beit_dist.tasks.finetuning.mixing import draw_mixture, mix_patches
from beit_dist.tasks.finetuning.numbers import ACCURACY, CLASSIFIED, numbers_of
from beit_dist.tasks.finetuning.task import Data, Finetuning, refuse_odd_ranks

_FEW = 5


class Rows(NamedTuple):
    """A micro-batch on the device."""

    patches: Tensor
    """(B, P, D): uint8, or float32 where images are mixed."""
    labels: Tensor
    """int64 (B,)."""
    others: Tensor
    """The partners' labels."""
    shares: Tensor
    """float32 (B,): of each label in its target; the rest is the partner's."""
    keeps: Tensor | None


class Classification(Finetuning[LabelledImages, Rows]):
    """Fine-tuning on images with a class each; recipe of unilm ``run_class_finetuning.py``."""

    kind = "classification"
    measured = CLASSIFIED

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config)
        self.numbers = numbers_of(config)

    def find(self) -> Data[LabelledImages]:
        """Class folders, lists, archives."""
        config, access = self.config, self.config.storage.access
        training = find_labelled(config.data or (), access, left_out=self.left_out)
        if (where := config.validation.data) is None:
            return Data(training, None)
        return Data(training, find_labelled(where, access, classes=training.classes, field="validation.data"))

    @cached_property
    def view(self) -> ClassificationView:
        """Random crops, RandAugment, erasing."""
        return ClassificationView(self.config.model, self.config.augmentation)

    def check(self, ranks: Ranks) -> None:
        """Find the images."""
        refuse_odd_ranks(self.config, ranks.world)
        super().check(ranks)

    def network(self) -> ImageClassifier:
        """Backbone and classifier."""
        config = self.config
        return ImageClassifier(
            config.model,
            len(self.classes),
            recompute=config.activation_checkpointing,
            head_init_scale=config.head_scale,
        )

    def model(self) -> nn.Module:
        """The network, initialised from the seed."""
        model = unfilled(self.network)
        model.initialise(self.config.seed)
        return model

    def describe_model(self, resolved: Resolved) -> Described:
        """Sizes, input and objective."""
        yield from super().describe_model(resolved)
        mixing = self.config.mixing
        mixed = f"mixup {mixing.mixup:g}, CutMix {mixing.cutmix:g}" if mixing.active else "no mixing"
        yield "target", f"the class of an image; label smoothing {self.config.label_smoothing:g}, {mixed}"

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        return multiply_adds(self.config.model, len(self.classes))

    def activation_bytes(self, resolved: Resolved) -> int:
        """Of the blocks; what the classifier keeps is too little to count."""
        config, size = self.config, 4 if resolved.precision == "fp32" else 2
        kept = backbone_activation_bytes(config.model, size, config.activation_checkpointing)
        return resolved.micro_batch * kept

    # ------------------------------------------------------------------------------------------------- the steps

    def weight(self, batch: LabelledBatch) -> int:
        """The number of images."""
        return len(batch.labels)

    def rows(self, batch: LabelledBatch) -> Iterator[Rows]:
        """Micro-batches; each image is mixed with its partner, wherever in the rank's rows that is."""
        config, around, samples = self.config, self._around, self._running.progress.samples
        device, count = around.device, around.resolved.rank_batch
        partners = torch.arange(count) ^ 1
        mixture = None
        if config.mixing.active:
            mixture = draw_mixture(config.mixing, config.seed, samples, around.rows, config.model.image_size)
        for low in range(0, count, around.resolved.micro_batch):
            rows, keeps = self.part(batch, low)
            patches = batch.patches[rows].to(device, non_blocking=True)
            labels = batch.labels[rows].to(device, non_blocking=True)
            if mixture is None:
                yield Rows(patches, labels, labels, torch.ones(len(labels), device=device), keeps)
                continue
            others = partners[rows]
            part = mixture.of(rows, device)
            mixed = mix_patches(patches, batch.patches[others].to(device), part, config.model.patch_size)
            yield Rows(mixed, labels, batch.labels[others].to(device), part.shares, keeps)

    def forward(self, rows: Rows, step: Step) -> Sums:
        """Cross-entropy against mixed and smoothed labels."""
        logits = self._running.engine(rows.patches, rows.keeps).float()
        own, other = (
            F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing, reduction="none")
            for labels in (rows.labels, rows.others)
        )
        loss = (rows.shares * own + (1 - rows.shares) * other).sum()
        numbers = [loss]
        if ACCURACY in self.numbers:
            numbers.append((logits.argmax(1) == rows.labels).sum())
        return Sums(loss, numbers)

    def baselines(self) -> KnownBaselines:
        """From how often each class occurs."""
        counts, smoothing = self.data.training.counts(), self.config.label_smoothing
        smoothed = (1 - smoothing) * counts / counts.sum() + smoothing / len(counts)
        training = self._baselines(counts, smoothed)
        if self.data.held_out is None:
            return KnownBaselines(training)
        return KnownBaselines(training, self._baselines(counts, self.data.held_out.counts()))

    @torch.no_grad()
    def evaluate(self, step: int) -> Mapping[str, Any] | None:
        """Loss and accuracy on held-out images."""
        around, config = self._around, self.config
        assert self.data.held_out is not None
        sums = torch.zeros(3, dtype=torch.float64, device=around.device)
        images = 0
        batches = held_out_batches(
            self.data.held_out,
            self.view,
            rank=around.ranks.rank,
            world=around.ranks.world,
            samples=self.measured_samples(),
            batch=around.resolved.micro_batch,
            loader=config.loader,
            access=config.storage.access,
        )
        with self._measured_model.now() as model:
            for batch in batches:
                if any(around.agreement.gather(around.stop.requested)):
                    return None
                around.alive()
                there = batch.labels >= 0
                labels = batch.labels.to(around.device)
                logits = model(batch.patches.to(around.device)).float()
                sums += _scores(logits, labels)
                images += int(there.sum())
        found = around.agreement.gather([*sums.tolist(), images])
        loss, right, among, count = (sum(column) for column in zip(*found, strict=True))
        numbers = {"loss": loss / count, "accuracy": right / count, "top5_accuracy": among / count}
        if len(self.classes) <= _FEW:
            del numbers["top5_accuracy"]  # all are among them
        return {**numbers, "images": int(count)}

    def _baselines(self, known: NDArray[np.int64], scored: Counts) -> Baselines:
        found = guesses(known, scored, "class", "classes")
        return found if len(self.classes) > _FEW else {n: b for n, b in found.items() if n != "top5_accuracy"}


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 (3,): cross-entropy, right answers, and right ones among the five most likely; label -1 counts not.

    A class is among these if fewer than five are more likely, so of classes that are equally likely all count.
    """
    there = labels >= 0
    logits, labels = logits[there], labels[there]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    likelier = (logits > logits.gather(1, labels[:, None])).sum(1)
    return torch.stack([loss.double(), right.double(), (likelier < _FEW).sum().double()])
