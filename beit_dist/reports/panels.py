"""What a model paints into masked patches: images, their masks, and its predictions as pictures."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.images.decoding import unpatchify
from beit_dist.models.dvae import DVAE
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.names import file_name, save, verbatim
from beit_dist.reports.samples import Pixels, ShardSample
from beit_dist.shards.manifest import Manifest
from beit_dist.stream.masking.base import Masks
from beit_dist.weights.tokenizer_files import digests_of

_GREY = 160
"""What masked patches are painted with."""
_ACROSS = 6
"""Samples side by side."""
_SIDE = 1.3
"""Inches: of a picture and the gap beside it."""
_LETTERS, _ROOM = 8, 72 * 0.93 * _SIDE
"""Points: size of the letters over a picture, and how wide a line of them may be."""


@dataclass(frozen=True)
class Reconstruction:
    """One sample's column of the panel; pictures are (height, width, 3) uint8."""

    name: str
    """The image's file name."""
    hidden: NDArray[np.bool_]
    """(grid, grid), which patches are masked."""
    image: Pixels
    masked: Pixels
    """The image with its masked patches in grey: what the model sees."""
    painted: dict[str, Pixels]
    """What comes of the predictions, by what it is called beside its row."""
    said: str
    """How good they are, in words."""


Painter = Callable[[Sequence[ShardSample], torch.Tensor, torch.Tensor], Iterator[tuple[dict[str, Pixels], str]]]
"""Makes ``painted`` and ``said`` of each sample from the samples, the masked positions (B, K) padded with -1, and
the model's predictions (B, K, O), on the CPU."""


def check_fit(model: MaskedImageModel, manifest: Manifest) -> None:
    """Refuse shards of another shape than the model's images.

    Raises:
        ConfigError: they have one.
    """
    for name in model.head.shared_with_shards:
        got, expected = getattr(manifest.layout, name), getattr(model.config, name)
        if got != expected:
            raise ConfigError(
                f"data: {name}",
                got,
                f"the run's {expected}",
                "Name the shards the run was trained on with --data.",
            )


def check_tokenizer(dvae: DVAE, manifest: Manifest) -> None:
    """Refuse a tokenizer that did not make the shards, or cannot draw.

    Raises:
        TokenizerError: it is another one, or has no decoder.
    """
    dvae.whole_decoder()
    if manifest.tokenizer not in digests_of(dvae):
        raise TokenizerError(
            f"tokenizer: got digest {dvae.digest[:12]}, expected {manifest.tokenizer[:12]}, the one that made the "
            "shards. Name that file with --tokenizer."
        )


@torch.no_grad()
def reconstruct(
    model: MaskedImageModel, samples: Sequence[ShardSample], masks: Masks, paint: Painter
) -> list[Reconstruction]:
    """Have the model predict the masked patches of each sample, and paint them.

    Args:
        model: with the run's weights; runs on the device it is on.
        samples: at least one.
        masks: those of the run; epoch 0's are used.
        paint: for the model's target.
    """
    device = next(model.parameters()).device
    positions = torch.from_numpy(
        masks.positions_of([0] * len(samples), [sample.sample_id for sample in samples])
    ).long()
    patches = torch.from_numpy(np.stack([sample.patches for sample in samples]))
    predicted = model.predict(patches.to(device), positions.to(device)).cpu()
    size, grid = model.config.patch_size, model.config.grid
    columns = []
    for sample, row, (painted, said) in zip(samples, positions, paint(samples, positions, predicted), strict=True):
        hidden = np.zeros(model.config.patches, np.bool_)
        hidden[row[row >= 0].numpy()] = True
        seen = np.where(hidden[:, None], np.uint8(_GREY), sample.patches)
        columns.append(
            Reconstruction(
                name=sample.source,
                hidden=hidden.reshape(grid, grid),
                image=unpatchify(sample.patches, size),
                masked=unpatchify(seen, size),
                painted=painted,
                said=said,
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
        samples: Sequence[ShardSample], positions: torch.Tensor, predicted: torch.Tensor
    ) -> Iterator[tuple[dict[str, Pixels], str]]:
        true = torch.from_numpy(np.stack([sample.tokens for sample in samples])).long()
        guesses, mixed = predicted.argmax(-1), true.clone()
        for row, chosen in enumerate(positions):
            mixed[row, chosen[chosen >= 0]] = guesses[row, chosen >= 0]
        pictures = zip(_decode(dvae, true), _decode(dvae, mixed), strict=True)
        for row, (best, painted) in enumerate(pictures):
            chosen = positions[row][positions[row] >= 0]
            right = int((mixed[row, chosen] == true[row, chosen]).sum())
            labelled = {"true tokens,\ndecoded": best, "masked tokens\npredicted,\ndecoded": painted}
            yield labelled, f"{100 * right / max(1, len(chosen)):.0f} % right{guessed}"

    return paint


def pixel_painter(head: PixelsHead) -> Painter:
    """Puts the predicted pixels in the place of the masked ones."""
    head = copy.deepcopy(head).cpu()

    def paint(
        samples: Sequence[ShardSample], positions: torch.Tensor, predicted: torch.Tensor
    ) -> Iterator[tuple[dict[str, Pixels], str]]:
        for sample, row, values in zip(samples, positions, predicted, strict=True):
            patches, tokens = torch.from_numpy(sample.patches), torch.from_numpy(sample.tokens)
            (loss,) = head.score(values[None], patches[None], tokens[None], row[None])
            shown, painted = row >= 0, patches.clone()
            painted[row[shown]] = head.paint(values[shown], patches[row[shown]])
            picture = unpatchify(painted.numpy(), head.config.patch_size)
            yield {"masked pixels\npredicted": picture}, f"loss {loss.item() / int(shown.sum()):.3f}"

    return paint


def draw_panel(columns: Sequence[Reconstruction], out: str | Path, title: str = "") -> None:
    """Write a PNG with a column for each sample and a row for each kind of picture, six samples side by side.

    The masked area is outlined in the painted pictures: only there does the model's work show.
    """
    labels = ["image", "what the\nmodel sees", *columns[0].painted]
    bands = [columns[first : first + _ACROSS] for first in range(0, len(columns), _ACROSS)]
    across, heading = len(bands[0]), textwrap.wrap(title, max(30, 13 * len(bands[0]) + 8))
    size = (_SIDE * across + 1.1, (_SIDE * len(labels) + 0.6) * len(bands) + 0.2 * len(heading) + 0.1)
    spacing = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=size, dpi=150, layout=spacing)
    grid = figure.subplots(len(labels) * len(bands), across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, band in enumerate(bands):
        rows = grid[number * len(labels) : (number + 1) * len(labels)]
        for place, column in enumerate(band):
            _draw_column(list(rows[:, place]), column)
        for axes, label in zip(rows[:, 0], labels, strict=True):
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    verbatim(figure.suptitle("\n".join(heading), fontsize=11))
    save(figure, out)


def _draw_column(axes: Sequence[Axes], column: Reconstruction) -> None:
    """A sample, from top to bottom."""
    pictures = [column.image, column.masked, *column.painted.values()]
    for place, picture in zip(axes, pictures, strict=True):
        place.set_axis_on()
        place.imshow(picture, interpolation="nearest")
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
    for place, picture in zip(axes[2:], pictures[2:], strict=True):
        _outline(place, column.hidden, picture.shape[0])
    verbatim(axes[0].set_title(file_name(column.name, _ROOM, _LETTERS), fontsize=_LETTERS))
    axes[-1].set_xlabel(column.said, fontsize=9)


def _outline(axes: Axes, hidden: NDArray[np.bool_], side: int) -> None:
    """A line around the masked area of a square picture of ``side`` pixels."""
    cell = side // len(hidden)
    area = np.kron(hidden, np.ones((cell, cell)))
    for colour, width in (("black", 1.6), ("white", 0.8)):  # to be seen on any picture
        axes.contour(area, levels=[0.5], colors=colour, linewidths=width)


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
