"""The tokenizer as the job uses it: batches of one fixed shape in, int16 tokens out; compiled where that pays."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from beit_dist.engine.compiled import check_compiler
from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.models.dvae import DVAE, check_finite, inference_arithmetic
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
        compiled: run it through torch.compile: on an H100 1.9 times as fast. Sums are rounded differently, so that
            a near-tie may give another token. It is compiled for the shape of the first batch, and anew for
            another.
    """

    def __init__(self, model: DVAE, precision: Precision, *, compiled: bool = False) -> None:
        self._precision = precision
        self._device = next(model.parameters()).device
        self._likeliest = model.likeliest
        if compiled:
            model.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._likeliest = torch.compile(model.likeliest, fullgraph=True, dynamic=False)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int16]:
        """uint8 (B, S, S, 3) to int16 (B, S/8, S/8).

        Raises:
            TokenizerError: the dVAE returns another grid than one token for 8×8 pixels, or no finite logits.
        """
        batch = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        with torch.no_grad(), inference_arithmetic(self._device):
            made, finite = self._likeliest(batch, self._precision)
        check_finite(finite, self._precision)
        tokens = made.cpu().numpy()
        expected = (images.shape[0], images.shape[1] // 8, images.shape[2] // 8)
        if tokens.shape != expected:
            raise TokenizerError(f"tokenizer: got tokens of shape {tokens.shape}, expected {expected}")
        return tokens.astype(np.int16)

    def warm_up(self, batch: int, side: int) -> None:
        """Encode nothing once: what is compiled, and what a device prepares, is then ready."""
        self(np.zeros((batch, side, side, 3), np.uint8))


def compiles_by_default(device: torch.device) -> bool:
    """Whether the tokenizer is compiled where nobody says: on a GPU, if there is a compiler.

    On a CPU it takes half a minute, to gain a quarter for a small dVAE.
    """
    if device.type != "cuda":
        return False
    try:
        check_compiler(device.type)
    except ConfigError:
        return False
    return True


def check_compiles(device: torch.device) -> None:
    """Check that the tokenizer can be compiled here.

    Raises:
        ConfigError: there is no compiler, or Python's headers are missing.
    """
    try:
        check_compiler(device.type)
    except ConfigError as error:
        way_out = error.way_out.replace("set compile=false", "use --no-compile in another --out")
        raise ConfigError("--compile", True, error.expected, way_out) from None
