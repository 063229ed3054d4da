"""The settings of fine-tuning: classification and semantic segmentation with a pre-trained backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from beit_dist.config.labelled import (
    AugmentationConfig,
    LabelledLoaderConfig,
    LabelMapsConfig,
    SegmentationViewConfig,
)
from beit_dist.config.model import BackboneConfig
from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.reading import Section
from beit_dist.config.vit import ViTRunConfig
from beit_dist.errors import ConfigError

_WARM_UPS = ("epochs", "steps", "share")


class FinetunedBackbone(BackboneConfig):
    """The backbone. Settings that are known from ``init_from`` need not be given."""

    block_positions: bool = True
    """Each block has its own table of relative position biases, as in the released fine-tuning code. A shared
    table of ``init_from`` is copied into each block."""


class FinetuningOptimizer(OptimizerConfig):
    """The optimizer and its schedule, with the defaults of fine-tuning (unilm ``run_class_finetuning.py``)."""

    lr: float = Field(5e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    clip_grad: float = Field(0.0, ge=0)
    warmup_share: float | None = Field(None, ge=0, lt=1)
    """Null takes a twentieth if no ``warmup_`` setting is given."""

    @model_validator(mode="before")
    @classmethod
    def _warm_up(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or any(values.get(f"warmup_{unit}") is not None for unit in _WARM_UPS):
            return values
        return {**values, "warmup_share": 0.05}


class MixingConfig(Section):
    """Training images are mixed in pairs (mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899)."""

    mixup: float = Field(0.8, ge=0)
    """Value of both parameters of the beta distribution from which mixup draws its shares: above 0.5, or 0 for no
    mixup."""
    cutmix: float = Field(1.0, ge=0)
    """The same for CutMix."""
    probability: float = Field(1.0, ge=0, le=1)
    """Probability that a pair is mixed at all."""
    switch: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix, rather than mixup, if both are in use."""

    @model_validator(mode="after")
    def _check(self) -> MixingConfig:
        for name in ("mixup", "cutmix"):
            if 0 < (given := getattr(self, name)) <= 0.5:
                raise ConfigError(f"mixing.{name}", given, "0, or a number above 0.5")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)


class SegmentationConfig(Section):
    """The head of a segmentation and how it is measured; the values are those of unilm's UperNet."""

    auxiliary_weight: float = Field(0.4, ge=0)
    """Weight of the auxiliary head's loss."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of channels that are dropped before the last layer of each head, in training."""
    stride: float = Field(2 / 3, gt=0, le=1)
    """Step between two sliding windows, as a share of ``model.image_size``."""
    flip: bool = False
    """At the end, also measure every image mirrored, and average."""
    scales: tuple[float, ...] = (1.0,)
    """At the end, measure every image at all of these scales, and average."""

    @model_validator(mode="after")
    def _check(self) -> SegmentationConfig:
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError("segmentation.scales", self.scales, "one or more factors above 0")
        return self


class FinetuningConfig(ViTRunConfig):
    """Fine-tuning on labelled images."""

    of_the_host: ClassVar[frozenset[str]] = ViTRunConfig.of_the_host | {"loader"}

    task: Literal["classification", "segmentation"] = "classification"
    """What is learnt: the class of each image, or of each pixel."""
    model: FinetunedBackbone = FinetunedBackbone()
    global_batch: int = Field(1024, ge=1)
    epochs: float = Field(100, gt=0)
    optimizer: FinetuningOptimizer = FinetuningOptimizer()
    layer_decay: float = Field(0.65, gt=0, le=1)
    """Each block's learning rate is this share of the next block's; 1 gives all blocks the same rate."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of a target that is spread over all classes, in classification."""
    head_scale: float = Field(0.001, gt=0)
    """Scale of the classifier's initial weights, relative to the usual scale."""
    augmentation: AugmentationConfig = AugmentationConfig()
    mixing: MixingConfig = MixingConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    views: SegmentationViewConfig = SegmentationViewConfig()
    maps: LabelMapsConfig = LabelMapsConfig()
    loader: LabelledLoaderConfig = LabelledLoaderConfig()
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and recompute the rest: less memory, a third more
    arithmetic, the same gradients."""

    @model_validator(mode="after")
    def _check(self) -> FinetuningConfig:
        self.timeouts.check_loader(self.loader.timeout_seconds)
        return self
