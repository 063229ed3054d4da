"""A pre-trained model, which can say what it expects behind masked patches."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import recorded
from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.inference.inputs import AnyImages, collected
from beit_dist.inference.model import LoadedModel
from beit_dist.inference.painting import Painter, Reconstruction, painted, pixel_painter, token_painter
from beit_dist.inference.preparing import name_of
from beit_dist.inference.tokenizers import check_tokenizer, find_tokenizer
from beit_dist.models.dvae import DVAE
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.models.mim import MaskedImageModel
from beit_dist.stream.masking.modes import masks_of
from beit_dist.weights.tokenizer_files import load_tokenizer

_TOKEN = 8
"""Pixels of the tokenizer's image along a visual token."""


class PretrainedModel(LoadedModel):
    """A backbone, and the head of its pre-training if the source has one."""

    @torch.no_grad()
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
            images: one or several; see :data:`beit_dist.inference.inputs.AnyImages`.
            masked: bool (grid, grid), or (B, grid, grid), true where a patch is hidden; or the share of patches
                that are, drawn as the run masks; or None for the run's own share.
            seed: of the masks that are drawn; the number of an image is part of their key.
            tokenizer: paints the predicted tokens; by default the run's, if it is found. Without any, the
                predicted tokens' numbers are all there is.

        Raises:
            ConfigError: the model has no head; or a mask of another shape, or one that hides all or nothing.
            DataError: an image cannot be used.
            TokenizerError: the tokenizer cannot be read, cannot draw, or is another one than the run's.
        """
        network = self.network
        if not isinstance(network, MaskedImageModel):
            raise ConfigError(
                "reconstruct",
                self.provenance.name,
                "a model with the head of its pre-training",
                "Load the run, or an export that keeps the head: safetensors, hf or unilm.",
            )
        images = collected(images)
        patches = self.patches_of(images)
        names = [] if isinstance(images, Tensor) else [name_of(image) for image in images]
        hidden = self._hidden(masked, len(patches), seed)
        paint: Painter | None = None
        tokens = torch.zeros(patches.shape[:2], dtype=torch.int64)
        if isinstance(network.head, PixelsHead):
            paint = pixel_painter(network.head)
        elif isinstance(network.head, TokensHead) and (dvae := self._tokenizer(tokenizer)) is not None:
            paint, tokens = token_painter(dvae), _tokens(dvae, patches, self.config.grid)
        return painted(network, patches, tokens, _positions(hidden), names or [""] * len(patches), paint)

    def _hidden(self, masked: NDArray[np.bool_] | float | None, count: int, seed: int) -> NDArray[np.bool_]:
        """(B, P)"""
        grid = self.config.grid
        if masked is None or (isinstance(masked, float | int | np.floating) and not isinstance(masked, bool)):
            settings = self._masking(None if masked is None else float(masked))
            return masks_of(settings, grid, seed).masked(np.zeros(count, np.int64), np.arange(count))
        hidden = np.asarray(masked)
        if hidden.dtype != np.bool_ or hidden.shape not in ((grid, grid), (count, grid, grid)):
            got = f"{hidden.dtype} {hidden.shape}" if hidden.ndim else masked
            raise ConfigError("masked", got, f"bool ({grid}, {grid}) or ({count}, {grid}, {grid}), or a share")
        hidden = np.broadcast_to(hidden, (count, grid, grid)).reshape(count, -1)
        if not hidden.any(1).all() or hidden.all(1).any():
            raise ConfigError("masked", "a mask that hides all or nothing", "one that hides some patches")
        return hidden

    def _masking(self, share: float | None) -> MaskingConfig:
        """The run's masking, or one of the share; blocks small enough for the grid."""
        recipe = self.provenance.recipe
        run = MaskingConfig() if recipe is None else recorded(PretrainingConfig, recipe).masking
        if share is not None:
            if not 0 < share <= 1 - 1 / self.config.patches:
                expected = f"a share between 0 and 1 that leaves one of the {self.config.patches} patches"
                raise ConfigError("masked", share, expected)
            run = run.model_copy(update={"ratio": share, "masked_patches": 0})
        elif recipe is not None:
            return run
        most = max(1, int(run.ratio * self.config.patches / 2))
        return run.model_copy(update={"min_block": min(run.min_block, most)})

    def _tokenizer(self, given: str | PathLike[str] | DVAE | None) -> DVAE | None:
        digest, recipe = self.provenance.tokenizer, self.provenance.recipe
        if given is None:
            if digest is None or recipe is None:
                return None
            return find_tokenizer(None, recorded(PretrainingConfig, recipe), digest, self.device)
        dvae = given if isinstance(given, DVAE) else load_tokenizer(Path(given), self.device)
        dvae.whole_decoder()
        if digest is not None:
            check_tokenizer(dvae, digest)
        vocabulary = self.network.get_submodule("lm_head").out_features
        if dvae.config.vocabulary != vocabulary:
            raise TokenizerError(
                f"tokenizer: got {dvae.config.vocabulary} tokens, expected {vocabulary}, as the model predicts"
            )
        return dvae


def _positions(hidden: NDArray[np.bool_]) -> Tensor:
    """Of (B, P), padded with -1: int64 (B, K)."""
    rows = [torch.from_numpy(np.flatnonzero(row)) for row in hidden]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _tokens(dvae: DVAE, patches: Tensor, grid: int) -> Tensor:
    """The true tokens of patches (B, P, D), resized as the tokenizer sees them: int64 (B, P), on the CPU."""
    side = round((patches.shape[2] // 3) ** 0.5)
    tiles = patches.float().view(-1, grid, grid, side, side, 3).permute(0, 5, 1, 3, 2, 4)
    pixels = tiles.reshape(-1, 3, grid * side, grid * side)
    device = next(dvae.parameters()).device
    if side != _TOKEN:
        pixels = F.interpolate(pixels, size=(_TOKEN * grid,) * 2, mode="bicubic", antialias=True)
    return dvae.tokens(pixels.round().clamp(0, 255).to(device, torch.uint8)).flatten(1).cpu()
