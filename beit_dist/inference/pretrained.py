"""A pre-trained model, which can say what it expects behind masked patches."""

from __future__ import annotations

from os import PathLike

import numpy as np
from numpy.typing import NDArray

from beit_dist.inference.model import AnyImages, LoadedModel
from beit_dist.inference.painting import Reconstruction
from beit_dist.models.dvae import DVAE


class PretrainedModel(LoadedModel):
    """A backbone, and the head of its pre-training if the source has one."""

    def reconstruct(
        self,
        images: AnyImages,
        masked: NDArray[np.bool_] | float | None = None,
        *,
        seed: int = 0,
        tokenizer: str | PathLike[str] | DVAE | None = None,
    ) -> list[Reconstruction]:
        """What the model sees in the gaps of images.

        Args:
            images: one or several; see :data:`beit_dist.inference.model.AnyImages`.
            masked: bool (grid, grid), or (B, grid, grid), true where a patch is hidden; or the share of patches that
                are, blockwise as in pre-training; or None for the run's own masking.
            seed: of the masks that are drawn, by the image's number.
            tokenizer: paints the predicted tokens; by default the run's, if it is found. Without any, the predicted
                tokens' numbers are all there is.

        Raises:
            ConfigError: the model has no head; or a mask of another shape, or that hides all or nothing.
            TokenizerError: the tokenizer cannot be read, or is another one than the run's.
        """
        raise NotImplementedError
