"""The tokenizer as the job uses it: batches of one fixed shape in, int16 tokens out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from beit_dist.errors import TokenizerError
from beit_dist.models.dvae import DVAE
from beit_dist.tokenizing.job import Precision


class Encoder(Protocol):
    """Anything that makes tokens of images: the dVAE, or a stand-in in tests."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int16]:
        """uint8 (B, S, S, 3) to int16 (B, S/8, S/8)."""
        ...


class DVAEEncoder:
    """A loaded dVAE on a device.

    Args:
        model: from :func:`beit_dist.weights.tokenizer_files.load_tokenizer`, on its device.
        precision: of the encoder's residual paths; all else is fp32.
    """

    def __init__(self, model: DVAE, precision: Precision) -> None:
        self._model, self._precision = model, precision
        self._device = next(model.parameters()).device

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int16]:
        """uint8 (B, S, S, 3) to int16 (B, S/8, S/8).

        Raises:
            TokenizerError: the dVAE returns another grid than one token for 8×8 pixels.
        """
        batch = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        tokens = self._model.tokens(batch, self._precision).cpu().numpy()
        expected = (images.shape[0], images.shape[1] // 8, images.shape[2] // 8)
        if tokens.shape != expected:
            raise TokenizerError(f"tokenizer: got tokens of shape {tokens.shape}, expected {expected}")
        return tokens.astype(np.int16)
