"""How labelled images are read and augmented: the sections that classification and segmentation use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from beit_dist.config.reading import Section
from beit_dist.errors import ConfigError

_RATIO = (3 / 4, 4 / 3)
_WHOLE_FROM = 384
"""Image size from which evaluation crops nothing away (unilm ``datasets.py``, ``build_transform``)."""
_SHARE = 224 / 256


class RandAugmentConfig(Section):
    """RandAugment (arXiv 1909.13719) as timm interprets ``rand-m9-mstd0.5-inc1``, the setting that unilm
    fine-tunes with."""

    magnitude: float = Field(9.0, ge=0, le=10)
    """Mean strength of an operation, from 0 to 10."""
    std: float = Field(0.5, ge=0)
    """Standard deviation of that strength."""
    layers: int = Field(2, ge=1)
    """Number of operations in a row; each is applied with probability 1/2."""


class AugmentationConfig(Section):
    """How an image of a classification is cropped and changed; the values are those of unilm's fine-tuning."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop takes."""
    ratio: tuple[float, float] = _RATIO
    """Smallest and largest aspect ratio of a crop, width to height."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring left to right."""
    rand_augment: RandAugmentConfig | None = RandAugmentConfig()
    """Null applies ``color_jitter`` instead."""
    color_jitter: float = Field(0.4, ge=0, le=1)
    """Brightness, contrast and saturation change by a factor that is up to this much below or above 1. As in timm,
    this is used only if ``rand_augment`` is null."""
    erasing: float = Field(0.25, ge=0, le=1)
    """Probability that noise covers a rectangle of 2 % to 33 % of the area."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How pixels are interpolated when crops are resized and when RandAugment rotates or shifts an image."""
    crop_share: float | None = Field(None, gt=0, le=1)
    """Side of the centred square that is evaluated, as a share of the shorter side. Null takes 224/256, or 1 if
    ``model.image_size`` is 384 or more."""

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ConfigError(
                "augmentation.scale", self.scale, "two shares, the smaller one first, above 0 and at most 1"
            )
        low, high = self.ratio
        if not 0 < low <= high:
            raise ConfigError("augmentation.ratio", self.ratio, "two ratios above 0, the smaller one first")
        return self

    def evaluated_share(self, image_size: int) -> float:
        """``crop_share``, or unilm's for this image size."""
        if self.crop_share is not None:
            return self.crop_share
        return 1.0 if image_size >= _WHOLE_FROM else _SHARE


class SegmentationViewConfig(Section):
    """How an image of a segmentation is scaled, cropped and changed; the values are mmseg's for BEiT on ADE20K."""

    base_size: int | None = Field(None, ge=1)
    """An image is scaled until its shorter side has this many pixels, or its longer side four times as many,
    whichever comes first. Null takes ``model.image_size``."""
    resize_ratio: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor by which an image is scaled in addition, in training."""
    cat_max_ratio: float = Field(0.75, gt=0, le=1)
    """Largest share of a crop's labelled pixels that one class may have. After ten attempts, any crop is
    accepted."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring left to right."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue."""

    @model_validator(mode="after")
    def _check(self) -> SegmentationViewConfig:
        low, high = self.resize_ratio
        if not 0 < low <= high:
            raise ConfigError(
                "views.resize_ratio", self.resize_ratio, "two factors above 0, the smaller one first"
            )
        return self


class LabelMapsConfig(Section):
    """What the numbers in label maps mean."""

    ids: tuple[int, int] | None = None
    """Smallest and largest class number in the maps: ``[1, 150]`` for ADE20K. Null counts from 0: as many classes
    as ``classes.txt`` has lines. Without that file, all maps of ``data`` are read at the start, and the largest
    number in any of them is the last class."""
    ignore_label: int | None = Field(255, ge=0)
    """The value that marks pixels without a class. Such pixels count neither in training nor in measurements.
    Null: there is none."""

    @model_validator(mode="after")
    def _check(self) -> LabelMapsConfig:
        if self.ids is not None and not 0 <= self.ids[0] <= self.ids[1]:
            raise ConfigError("maps.ids", self.ids, "the smallest and the largest number of a class, from 0 on")
        return self


class LabelledLoaderConfig(Section):
    """The processes that read, decode and augment labelled images."""

    workers: int = Field(2, ge=0)
    """Processes per rank. 0 works in a thread of the rank itself."""
    prefetch: int = Field(2, ge=1)
    """How many steps the workers prepare ahead."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long the trainer waits for a batch before it gives up, in seconds."""
