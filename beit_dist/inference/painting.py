"""What a pre-trained model predicts of masked patches, as pictures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from beit_dist.images.decoding import Pixels, unpatchify
from beit_dist.models.dvae import DVAE
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.models.mim import MaskedImageModel

_GREY = 160
"""What masked patches are painted with."""


@dataclass(frozen=True)
class Reconstruction:
    """One image, and what a model makes of its masked patches; pictures are (height, width, 3) uint8."""

    name: str
    """The image's file name, where it has one."""
    hidden: NDArray[np.bool_]
    """(grid, grid), which patches are masked."""
    image: Pixels
    masked: Pixels
    """The image with its masked patches in grey: what the model sees."""
    painted: dict[str, Pixels]
    """What comes of the predictions, by what it is called, such as ``masked tokens predicted, decoded``. Empty
    where nothing can be painted."""
    said: str
    """How good they are, in words."""
    tokens: NDArray[np.int64] | None = None
    """(grid, grid): the likeliest visual token of each masked patch, -1 elsewhere. None where the model predicts
    something else."""


Painter = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Iterator[tuple[dict[str, Pixels], str]]
]
"""Makes ``painted`` and ``said`` of each sample from the patches (B, P, D) uint8, their true tokens (B, P), the
masked positions (B, K) padded with -1, and the model's predictions (B, K, O), all on the CPU."""


@torch.no_grad()
def painted(
    model: MaskedImageModel,
    patches: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    names: Sequence[str],
    paint: Painter | None,
) -> list[Reconstruction]:
    """Have the model predict the masked patches of each sample, and paint them.

    Args:
        model: with the run's weights; runs on the device it is on.
        patches: (B, P, D), uint8 or on the same scale.
        tokens: int64 (B, P), the true ones; anything where ``paint`` does not look at them.
        positions: int64 (B, K), ascending, padded with -1.
        names: of the images.
        paint: for the model's target; None paints nothing.
    """
    device = next(model.parameters()).device
    predicted = model.predict(patches.to(device), positions.to(device)).float().cpu()
    shown = (patches if patches.dtype == torch.uint8 else patches.round().clamp(0, 255).to(torch.uint8)).cpu()
    size, grid = model.config.patch_size, model.config.grid
    made = iter([({}, "")] * len(names)) if paint is None else paint(shown, tokens, positions, predicted)
    columns = []
    for row, (name, (pictures, said)) in enumerate(zip(names, made, strict=True)):
        there = positions[row] >= 0
        hidden = np.zeros(model.config.patches, np.bool_)
        hidden[positions[row][there].numpy()] = True
        likeliest = np.full(model.config.patches, -1, np.int64)
        likeliest[hidden] = predicted[row][there].argmax(-1).numpy()
        pixels = shown[row].numpy()
        columns.append(
            Reconstruction(
                name=name,
                hidden=hidden.reshape(grid, grid),
                image=unpatchify(pixels, size),
                masked=unpatchify(np.where(hidden[:, None], np.uint8(_GREY), pixels), size),
                painted=pictures,
                said=said,
                tokens=likeliest.reshape(grid, grid) if isinstance(model.head, TokensHead) else None,
            )
        )
    return columns


def token_painter(dvae: DVAE, guessing: float = math.nan) -> Painter:
    """Decodes the true tokens, and then the most likely ones where masked, with the tokenizer of the shards.

    Args:
        dvae: the tokenizer.
        guessing: share of the tokens that is right without looking, 0 to 1; NaN if it is not known.
    """
    guessed = "" if math.isnan(guessing) else f",\n{100 * guessing:.0f} % by guessing"

    def paint(
        patches: torch.Tensor, true: torch.Tensor, positions: torch.Tensor, predicted: torch.Tensor
    ) -> Iterator[tuple[dict[str, Pixels], str]]:
        guesses, mixed = predicted.argmax(-1), true.clone()
        for row, chosen in enumerate(positions):
            mixed[row, chosen[chosen >= 0]] = guesses[row, chosen >= 0]
        pictures = zip(_decode(dvae, true), _decode(dvae, mixed), strict=True)
        for row, (best, picture) in enumerate(pictures):
            chosen = positions[row][positions[row] >= 0]
            right = int((mixed[row, chosen] == true[row, chosen]).sum())
            labelled = {"true tokens, decoded": best, "masked tokens predicted, decoded": picture}
            yield labelled, f"{100 * right / max(1, len(chosen)):.0f} % right{guessed}"

    return paint


def pixel_painter(head: PixelsHead) -> Painter:
    """Puts the predicted pixels in the place of the masked ones."""
    head = copy.deepcopy(head).cpu()

    def paint(
        patches: torch.Tensor, true: torch.Tensor, positions: torch.Tensor, predicted: torch.Tensor
    ) -> Iterator[tuple[dict[str, Pixels], str]]:
        for own, tokens, row, values in zip(patches, true, positions, predicted, strict=True):
            (loss,) = head.score(values[None], own[None], tokens[None], row[None])
            shown, picture = row >= 0, own.clone()
            picture[row[shown]] = head.paint(values[shown], own[row[shown]])
            pixels = unpatchify(picture.numpy(), head.config.patch_size)
            yield {"masked pixels predicted": pixels}, f"loss {loss.item() / int(shown.sum()):.3f}"

    return paint


def decode_tokens(dvae: DVAE, tokens: Sequence[NDArray[np.int16]]) -> Pixels:
    """What the tokenizer makes of grids of tokens: (B, height, width, 3)."""
    with torch.no_grad():
        return _decode(dvae, torch.from_numpy(np.stack(tokens)).long().flatten(1))


def _decode(dvae: DVAE, tokens: torch.Tensor) -> Pixels:
    """Tokens (B, P) to pictures (B, height, width, 3)."""
    grid = round(tokens.shape[1] ** 0.5)
    device = next(dvae.parameters()).device
    images = dvae.decode(tokens.view(-1, grid, grid).to(device)).cpu()
    pixels: Pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels
