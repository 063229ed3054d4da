"""Any image to the pixels that a model looks at, as the measurements of its run make them. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.config.labelled import AugmentationConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError, DataError, StorageError, printable
from beit_dist.images.decoding import Pixels, decode, upright_rgb
from beit_dist.images.labelled.views import ClassificationView
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of


@runtime_checkable
class OpenFile(Protocol):
    """A file that was opened to read bytes, such as ``io.BytesIO``."""

    def read(self) -> bytes: ...


AnyImage = Image.Image | NDArray[np.uint8] | str | os.PathLike[str] | bytes | OpenFile
"""One image: of Pillow, in any mode; uint8 (H, W, 3), (H, W, 4) or (H, W); a path or URL; a file's bytes; or
a file that was opened to read them."""
EXPECTED = "images of Pillow, uint8 arrays (H, W, 3), paths, URLs, image files as bytes or opened, or tensors"
_CHANNELS = (3, 4)


@dataclass(frozen=True)
class Preparation:
    """``model.prepare``: from an image to uint8 (S, S, 3), S being the model's ``image_size``.

    Thread-safe; pickled it holds settings only, and a process that receives it need not load torch. So images are
    decoded in threads or processes, and the results go to the model as one tensor:

        pixels = torch.from_numpy(np.stack(list(pool.map(model.prepare, paths))))  # uint8 (B, S, S, 3)
        model.features(pixels)
    """

    config: BackboneConfig
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    access: Access = field(default_factory=Access)

    def __call__(self, image: AnyImage) -> Pixels:
        """The centred square of an image, resized: what a classification is measured on, and ``beit probe``.

        Raises:
            ConfigError: it is no image at all.
            DataError: the image cannot be used.
            StorageError: a store failed for as long as it was tried again.
        """
        return np.array(ClassificationView(self.config, self.augmentation).centred(self._rgb(image)))

    def whole(self, image: AnyImage) -> Pixels:
        """All of an image, upright, in its own size: uint8 (H, W, 3). Raises what a call does."""
        return np.array(self._rgb(image))

    def _rgb(self, image: AnyImage) -> Image.Image:
        try:
            if isinstance(image, Image.Image):
                return upright_rgb(image)
            if isinstance(image, np.ndarray):
                return upright_rgb(Image.fromarray(_checked(image)))
            if isinstance(image, bytes | bytearray | memoryview):
                return decode(bytes(image))
            if isinstance(image, str | os.PathLike):
                return decode(self._read(os.fspath(image)))
            if isinstance(image, OpenFile) and isinstance(content := image.read(), bytes):
                return decode(content)
        except ImageRejectedError as error:
            raise DataError(f"{name_of(image) or 'images'}: {error}. Mend or leave it out") from None
        raise ConfigError("images", type(image).__name__, EXPECTED)

    def _read(self, path: str) -> bytes:
        place, name = place_of(path, self.access)
        try:
            return place.read(name)
        except StorageError:
            raise
        except IsADirectoryError:
            raise DataError(
                f"{printable(path) or 'an empty path'}: is a folder, expected an image. Name the images in "
                "it, such as sorted(Path(folder).iterdir())"
            ) from None
        except OSError as error:
            pattern = ". Patterns are not expanded here: see glob.glob" if set(path) & set("*?[") else ""
            raise DataError(f"{printable(path)}: cannot be read ({error.strerror or error}){pattern}") from None


def name_of(image: object) -> str:
    """An image's path or URL for messages; empty where it has none."""
    path = image
    if isinstance(image, Image.Image | OpenFile):
        path = getattr(image, "filename", "") or getattr(image, "name", "")
    return printable(os.fsdecode(path)) if isinstance(path, str | os.PathLike) else ""


def _checked(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)):
        way_out = "What is normalised already goes in as a tensor (B, 3, S, S)."
        if array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in _CHANNELS:
            way_out = "Put the channels last: array.transpose(1, 2, 0)."
        raise ConfigError(
            "images",
            f"an array {array.shape} of {array.dtype}",
            "uint8 arrays (height, width, 3), values from 0 to 255",
            way_out,
        )
    if not array.size:
        raise ConfigError("images", f"an array {array.shape}", "one with pixels")
    return np.ascontiguousarray(array)
