"""Images in any form to the patches that a network takes. What cannot be used is named, with what was expected."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError
from beit_dist.inference.preparing import EXPECTED, AnyImage, OpenFile, Preparation

AnyImages = AnyImage | Iterable[AnyImage] | Tensor
"""One image or several. What is no tensor is prepared by ``model.prepare``. A tensor is taken as it is, on any
device: uint8 (B, S, S, 3) or (B, 3, S, S), pixels of 0 to 255 such as ``model.prepare`` returns; or floating-point
(B, 3, S, S), normalised as ``model.normalise`` does. A tensor may also be of one image, without B."""
_ONE = (Image.Image, np.ndarray, str, os.PathLike, bytes, bytearray, memoryview, OpenFile)
_MANY = "OSU"
"""Kinds of arrays that hold images or paths, such as a column of a table, and not pixels."""
_BEYOND = 1.0
"""How far a normalised pixel may lie beyond black or white, in units of their distance: resizing and noise
overshoot. Pixels of 0 to 255 that nobody normalised lie beyond that."""


def listed(images: AnyImages) -> list[AnyImage]:
    """The images, one by one.

    Raises:
        ConfigError: there are none, or they are none.
    """
    if isinstance(images, np.ndarray) and (images.ndim == 4 or (images.ndim == 1 and images.dtype.kind in _MANY)):
        found: list[AnyImage] = list(images)
    elif isinstance(images, _ONE):
        found = [cast(AnyImage, images)]
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        found = list(images)
    else:
        raise ConfigError("images", type(images).__name__, EXPECTED)
    if not found:
        raise ConfigError("images", [], "at least one")
    return found


def collected(images: AnyImages) -> list[AnyImage] | Tensor:
    """Images as one tensor (B, ...), if they came as one or as several of one size; or else one by one.

    Raises:
        ConfigError: there are none, they are none, or tensors are of several sizes, or not all are tensors.
    """
    images = images if isinstance(images, Tensor) else listed(images)
    given = as_tensor(images)
    return listed(images) if given is None else given


def as_tensor(images: AnyImages) -> Tensor | None:
    """Images that came as a tensor, or as a list of tensors of one size, with B; None for all others.

    Raises:
        ConfigError: the tensors of a list are of several sizes, or not all are tensors.
    """
    if isinstance(images, list | tuple) and any(isinstance(image, Tensor) for image in images):
        shapes = {tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in images}
        if len(shapes) > 1:
            raise ConfigError("images", sorted(map(str, shapes)), "tensors of one size in a list")
        images = torch.stack(cast(list[Tensor], list(images)))
    if not isinstance(images, Tensor):
        return None
    return images.unsqueeze(0) if images.dim() == 3 else images


def patches_of(images: AnyImages, prepare: Preparation, device: torch.device) -> Tensor:
    """Patches as a network takes them, on its device: (B, P, D), uint8, or fp32 between 0 and 255.

    Raises:
        ConfigError: they are no images, or a tensor of another shape, dtype or range.
        DataError: an image cannot be used.
        StorageError: a store failed for as long as it was tried again.
    """
    config, given = prepare.config, collected(images)
    if isinstance(given, list):
        given = torch.from_numpy(np.stack([prepare(image) for image in given]))
    pixels = channels_first(given, config)
    if pixels.dtype != torch.uint8:
        _check_range(pixels, config)
    pixels = pixels.to(device)
    if pixels.dtype != torch.uint8:
        mean, std = statistics(config, device)
        pixels = (pixels.float() * std + mean) * 255
    return _patchified(pixels, config.patch_size)


def normalised(pixels: Tensor, config: BackboneConfig) -> Tensor:
    """uint8 (B, S, S, 3) or (B, 3, S, S), or one of them, to fp32 (B, 3, S, S).

    Raises:
        ConfigError: it is another tensor.
    """
    given = as_tensor(pixels)
    if given is None or given.dtype != torch.uint8:
        got = type(pixels).__name__ if given is None else given.dtype
        raise ConfigError("pixels", str(got), "a uint8 tensor, such as torch.from_numpy(model.prepare(image))")
    mean, std = statistics(config, given.device)
    return (channels_first(given, config).float() / 255 - mean) / std


def channels_first(images: Tensor, config: BackboneConfig) -> Tensor:
    """Images (B, S, S, 3) or (B, 3, S, S) as (B, 3, S, S).

    Raises:
        ConfigError: they have another shape or dtype.
    """
    side, got = config.image_size, f"a tensor {tuple(images.shape)} of {images.dtype}".replace("torch.", "")
    if images.dtype == torch.uint8:
        expected = f"uint8 ({side}, {side}, 3) or (B, {side}, {side}, 3), or channels first"
    elif images.is_floating_point():
        expected = f"normalised pixels (3, {side}, {side}) or (B, 3, {side}, {side})"
    else:
        raise ConfigError("images", got, "uint8 pixels from 0 to 255, or floating-point ones that are normalised")
    if images.dim() == 4 and images.dtype == torch.uint8 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.dim() != 4 or images.shape[1] != 3:
        raise ConfigError("images", got, expected)
    if images.shape[2:] != (side, side):
        height, width = images.shape[2:]
        fits = height == width and height and not height % config.patch_size
        way_out = f"Load the model with image_size={height}." if fits else "Resize them, or give images or paths."
        raise ConfigError("images", got, expected, way_out)
    if not len(images):
        raise ConfigError("images", got, "at least one image")
    return images


def statistics(config: BackboneConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of pixels on a scale of 0 to 1, (3, 1, 1) each."""
    mean, std = (torch.tensor(unit, device=device).view(3, 1, 1) for unit in (config.pixel_mean, config.pixel_std))
    return mean, std


def _check_range(images: Tensor, config: BackboneConfig) -> None:
    """Refuse what was not normalised, or is not finite; warn of pixels of 0 to 1, which may be either.

    On an accelerator only where no gradient is computed: a training would wait for the numbers at each step.
    """
    if torch.compiler.is_compiling() or (images.device.type != "cpu" and torch.is_grad_enabled()):
        return
    low, high = (found.item() for found in torch.aminmax(images.detach().float()))
    pairs = list(zip(config.pixel_mean, config.pixel_std, strict=True))
    least = min((-_BEYOND - mean) / std for mean, std in pairs)
    most = max((1 + _BEYOND - mean) / std for mean, std in pairs)
    if not (least <= low and high <= most):  # neither holds for what is not a number
        raise ConfigError(
            "images",
            f"floating-point values from {low:g} to {high:g}",
            f"normalised pixels, (x / 255 - mean) / std, which lie between {least:.3g} and {most:.3g}",
            "Give pixels of 0 to 255 as uint8, or use model.normalise.",
        )
    if 0 <= low < high <= 1:  # what torchvision's ToTensor gives; normalised, half of an image is below 0
        warnings.warn(
            f"images: floating-point values from {low:g} to {high:g} look as if they were not normalised: give "
            "pixels of 0 to 255 as uint8, or normalise them, (x - mean) / std",
            stacklevel=4,
        )


def _patchified(images: Tensor, patch: int) -> Tensor:
    """(B, 3, S, S) to (B, P, D) in the order of a shard: row-major patches, y, x, channel inside a patch."""
    grid = images.shape[2] // patch
    tiles = images.reshape(len(images), 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
    return tiles.reshape(len(images), grid * grid, 3 * patch * patch)
