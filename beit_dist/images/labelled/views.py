"""What a training takes of labelled images: for each purpose a view, a pure function of image and key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.config.labelled import AugmentationConfig, SegmentationViewConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.draws import Purpose, Words, below, uniforms, words
from beit_dist.images.decoding import CROP_WORDS, Pixels, box_of
from beit_dist.images.labelled.images import LabelledImages
from beit_dist.images.labelled.label_maps import IGNORED, LabelMaps
from beit_dist.images.labelled.pixel_noise import (
    JITTER_WORDS,
    PHOTOMETRIC_WORDS,
    colour_jitter,
    erase,
    photometric,
)
from beit_dist.images.labelled.rand_augment import WORDS, rand_augment
from beit_dist.images.labelled.reading import read_image
from beit_dist.storage.access import Access

Images = TypeVar("Images", LabelledImages, LabelMaps)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LONGER = 4
"""mmseg's ``img_scale=(2048, 512)``: the longer side may have four times as many pixels as the shorter one."""
_ATTEMPTS = 10
"""Crops that are drawn anew where one class fills too much (mmseg's ``RandomCrop``)."""


class Labelled(NamedTuple):
    """A view of one image."""

    pixels: Pixels
    """uint8 (S, S, 3) in training; (H, W, 3) where a whole image is measured."""
    label: NDArray[Any]
    """int64 () for a class; uint8 (S, S) or (H, W) for a map, where 255 is no class."""


class View(ABC, Generic[Images]):
    """How a sample is made of an image. Can be pickled.

    Args:
        model: sizes, and the normalisation: its mean fills what lies outside an image.
    """

    label_dtype: type[np.generic]

    def __init__(self, model: BackboneConfig) -> None:
        self.model = model

    @property
    @abstractmethod
    def label_shape(self) -> tuple[int, ...]:
        """Shape of a sample's label in training."""

    @abstractmethod
    def training(self, images: Images, number: int, access: Access, seed: int, epoch: int) -> Labelled:
        """Image ``number``, augmented: a pure function of its bytes, ``seed``, ``epoch`` and ``number``.

        Raises:
            DataError: the image or its label cannot be used; it is named.
            StorageError: a store failed for as long as it was tried again.
        """

    @abstractmethod
    def held_out(self, images: Images, number: int, access: Access) -> Labelled:
        """Image ``number`` as it is measured; raises what :meth:`training` does."""

    @property
    def mean_pixel(self) -> tuple[int, int, int]:
        """Red, green and blue of what lies beyond an image's edges: 0 once it is normalised, but for rounding."""
        red, green, blue = (round(255 * mean) for mean in self.model.pixel_mean)
        return red, green, blue


class ClassificationView(View[LabelledImages]):
    """A random crop in training; the centred square of the resized image where it is measured.

    The order is that of timm's ``transforms_imagenet_train``, which unilm calls: crop, mirroring, RandAugment or
    colour jitter, erasing.
    """

    label_dtype = np.int64

    def __init__(self, model: BackboneConfig, augmentation: AugmentationConfig) -> None:
        super().__init__(model)
        self.augmentation = augmentation

    @property
    def label_shape(self) -> tuple[int, ...]:
        return ()

    def training(self, images: LabelledImages, number: int, access: Access, seed: int, epoch: int) -> Labelled:
        pixels = self.augmented(read_image(images.files[number], access), seed, (epoch, number))
        return Labelled(pixels, images.labels[number])

    def augmented(self, image: Image.Image, seed: int, key: tuple[int, int]) -> Pixels:
        """A view of an image.

        Args:
            image: RGB.
            key: epoch and sample.
        """
        augmentation, size, resample = self.augmentation, self.model.image_size, self._resample
        drawn = words(seed, Purpose.LABELLED_VIEW, key, CROP_WORDS + 1)
        box = box_of(image.width, image.height, drawn[:CROP_WORDS], augmentation.scale, augmentation.ratio)
        image = image.crop(box).resize((size, size), resample)
        if uniforms(drawn[CROP_WORDS:])[0] < augmentation.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augmentation.rand_augment is not None:
            count = WORDS * augmentation.rand_augment.layers
            changes = words(seed, Purpose.AUGMENTATION, key, count)
            image = rand_augment(image, augmentation.rand_augment, changes, resample, self.mean_pixel)
        elif augmentation.color_jitter:
            changes = words(seed, Purpose.AUGMENTATION, key, JITTER_WORDS)
            image = colour_jitter(image, augmentation.color_jitter, changes)
        model = self.model
        return erase(np.asarray(image), augmentation.erasing, model.pixel_mean, model.pixel_std, seed, key)

    def held_out(self, images: LabelledImages, number: int, access: Access) -> Labelled:
        return Labelled(self.centred(read_image(images.files[number], access)), images.labels[number])

    def centred(self, image: Image.Image) -> Pixels:
        """The centred square of the resized image (torchvision's ``Resize`` and ``CenterCrop``)."""
        size = self.model.image_size
        shorter = int(size / self.augmentation.evaluated_share(size))
        width, height = image.size
        longer = int(shorter * max(width, height) / min(width, height))
        image = image.resize((shorter, longer) if width < height else (longer, shorter), self._resample)
        left, top = (round((side - size) / 2) for side in image.size)
        return np.asarray(image.crop((left, top, left + size, top + size)))

    @property
    def _resample(self) -> Image.Resampling:
        return _FILTERS[self.augmentation.interpolation]


class SegmentationView(View[LabelMaps]):
    """A random crop of image and map in training; both whole, in their own size, where they are measured.

    Order and ranges are those of mmseg's pipeline for ADE20K: scaling, crop, mirroring, colours, padding.
    """

    label_dtype = np.uint8

    def __init__(self, model: BackboneConfig, augmentation: SegmentationViewConfig) -> None:
        super().__init__(model)
        self.augmentation = augmentation

    @property
    def label_shape(self) -> tuple[int, ...]:
        return self.model.image_size, self.model.image_size

    def training(self, images: LabelMaps, number: int, access: Access, seed: int, epoch: int) -> Labelled:
        pixels, labels = images.read(number, access)
        return self.augmented(pixels, labels, seed, (epoch, number))

    def augmented(self, pixels: Pixels, labels: Pixels, seed: int, key: tuple[int, int]) -> Labelled:
        """A view of an image, uint8 (H, W, 3), and its map, uint8 (H, W); ``key``: epoch and sample."""
        size, augmentation = self.model.image_size, self.augmentation
        drawn = words(seed, Purpose.LABELLED_VIEW, key, 2 + 2 * (1 + _ATTEMPTS))
        zoom, flip = uniforms(drawn[:2]).tolist()
        low, high = augmentation.resize_ratio
        width, height = self._scaled_size(pixels, low + (high - low) * zoom)
        columns, rows = _nearest(width, labels.shape[1]), _nearest(height, labels.shape[0])
        left, top = self._corner(labels, rows, columns, drawn[2:])
        w, h = min(size, width), min(size, height)
        x, y = pixels.shape[1] / width, pixels.shape[0] / height
        box = (left * x, top * y, min((left + w) * x, pixels.shape[1]), min((top + h) * y, pixels.shape[0]))
        # Resizing the crop alone gives what resizing all of the image gives, but for a pixel along its edges.
        crop = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR, box=box))
        part = labels[rows[top : top + h]][:, columns[left : left + w]]
        if flip < augmentation.flip:
            crop, part = crop[:, ::-1], part[:, ::-1]
        if augmentation.photometric:
            crop = photometric(crop, words(seed, Purpose.AUGMENTATION, key, PHOTOMETRIC_WORDS))
        padded, marked = np.empty((size, size, 3), np.uint8), np.full((size, size), IGNORED, np.uint8)
        padded[:] = self.mean_pixel
        padded[:h, :w], marked[:h, :w] = crop, part
        return Labelled(padded, marked)

    def held_out(self, images: LabelMaps, number: int, access: Access) -> Labelled:
        return Labelled(*images.read(number, access))

    def scaled(self, pixels: Pixels, factor: float = 1.0) -> Pixels:
        """A whole image, scaled to ``base_size`` and then by ``factor``: uint8 (h, w, 3)."""
        size = self._scaled_size(pixels, factor)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))

    def _scaled_size(self, pixels: Pixels, factor: float) -> tuple[int, int]:
        """Width and height (mmcv's ``rescale_size``)."""
        height, width = pixels.shape[:2]
        base = (self.augmentation.base_size or self.model.image_size) * factor
        scale = min(base / min(height, width), _LONGER * base / max(height, width))
        return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))

    def _corner(
        self, labels: Pixels, rows: NDArray[np.intp], columns: NDArray[np.intp], drawn: Words
    ) -> tuple[int, int]:
        """Left and top of the first crop in which no class fills too much, or else of the last one drawn."""
        size, most = self.model.image_size, self.augmentation.cat_max_ratio
        left = top = 0
        for across, down in drawn.reshape(-1, 2).tolist():
            left, top = below(across, max(0, len(columns) - size) + 1), below(down, max(0, len(rows) - size) + 1)
            if most == 1:
                break
            part = labels[rows[top : top + size]][:, columns[left : left + size]]
            counts = np.bincount(part.ravel(), minlength=IGNORED + 1)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() < most * counts.sum():
                break
        return left, top


def _nearest(size: int, source: int) -> NDArray[np.intp]:
    """For each of ``size`` pixels, the nearest of ``source``."""
    return np.minimum(((np.arange(size) + 0.5) * source / size).astype(np.intp), source - 1)
