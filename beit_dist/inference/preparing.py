"""Any image to the pixels that a model looks at, as the measurements of its run make them. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.config.labelled import AugmentationConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.images.decoding import Pixels
from beit_dist.storage.access import Access

AnyImage = Image.Image | NDArray[np.uint8] | str | os.PathLike[str] | bytes
"""One image: of Pillow, in any mode; uint8 (H, W, 3), (H, W, 4) or (H, W); a path or URL; or a file's bytes."""


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
            DataError: the image cannot be used.
            StorageError: a store failed for as long as it was tried again.
        """
        raise NotImplementedError

    def whole(self, image: AnyImage) -> Pixels:
        """All of an image, upright, in its own size: uint8 (H, W, 3). Raises what a call does."""
        raise NotImplementedError
