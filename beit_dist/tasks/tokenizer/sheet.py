"""A tokenizer in one picture: held-out images over their reconstructions, and what its tokens look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePosixPath

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from beit_dist.lettering import fitted, font
from beit_dist.models.dvae import DVAE, STRIDE
from beit_dist.models.verdict import Drawn
from beit_dist.tasks.tokenizer.quality import Quality, as_pixels, redrawn

_COLUMNS, _ROWS = 8, 2
_GAP, _MARGIN = 6, 16
_LARGEST = 144
"""Pixels of an image's side in the picture, at most; small ones are enlarged by a whole factor."""
_TOKEN = 3 * STRIDE
"""Pixels of a token's side in the picture."""
_TOKENS = 512
"""Tokens that are drawn, at most."""
_AROUND = 3
"""A token is decoded among so many times so many of its own kind, and the one in the middle is shown."""
_TITLE, _TEXT, _NAME = 26, 20, 13
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def draw_sheet(
    model: DVAE, images: Tensor, names: Sequence[str], quality: Quality, drawn: Drawn, step: int
) -> bytes:
    """A PNG, the same bytes for the same tokenizer.

    Args:
        images: held out, uint8 ``(N, 3, H, W)``; the first sixteen are shown.
        names: of their files.
        quality: measured on all of them.
        drawn: the same PSNR beside its baselines.
        step: of the training.
    """
    shown = images[: _COLUMNS * _ROWS]
    pairs = [_pair(*both) for both in zip(shown, redrawn(model, shown)[1], strict=True)]
    order = quality.counts.argsort(descending=True, stable=True)[: min(_TOKENS, quality.use.used)]
    tokens = _tokens(model, order)
    width = 2 * _MARGIN + _COLUMNS * (pairs[0].width + _GAP) - _GAP
    sheet = _Sheet(width)
    sheet.text(f"Tokenizer after {step:,} steps: {drawn.psnr:.2f} dB on {len(images)} held-out images", _TITLE)
    palette, exact = drawn.colours
    sheet.text(f"one colour for each patch would give {exact:.2f} dB (mean colour) or {palette:.2f} dB (palette)")
    sheet.text("Originals, and below each what its tokens draw", _TEXT, above=10)
    sheet.row(pairs, [PurePosixPath(name).name for name in names], _COLUMNS)
    use = quality.use
    few = f"the {len(tokens)} commonest of " if len(tokens) < use.used else ""
    sheet.text(f"Codebook, by use: {few}{use.used:,} of {use.vocabulary:,} tokens in use", _TEXT, above=10)
    sheet.row(tokens, [], (width - 2 * _MARGIN + _GAP // 2) // (_TOKEN + _GAP // 2), _GAP // 2)
    return sheet.png()


class _Sheet:
    """White paper that is filled from the top."""

    def __init__(self, width: int) -> None:
        self._width, self._end = width, _MARGIN
        self._placed: list[tuple[Image.Image, int, int]] = []
        self._written: list[tuple[str, int, int, int, tuple[int, int, int]]] = []

    def text(self, line: str, size: int = _TEXT, above: int = 0) -> None:
        """A line of text, smaller where it would not fit."""
        room = self._width - 2 * _MARGIN
        while size > _NAME and font(size).getlength(line) > room:
            size -= 1
        self._end += above
        self._written.append((line, _MARGIN, self._end, size, _INK if above or size > _TEXT else _FAINT))
        self._end += round(size * 1.5)

    def row(self, cells: Sequence[Image.Image], names: Sequence[str], columns: int, gap: int = _GAP) -> None:
        """Cells of one size in rows, with their names below them."""
        wide, high = cells[0].size
        for first in range(0, len(cells), columns):
            for place, cell in enumerate(cells[first : first + columns]):
                x = _MARGIN + place * (wide + gap)
                self._placed.append((cell, x, self._end))
                if names:
                    name = fitted(names[first + place], wide, _NAME)
                    self._written.append((name, x, self._end + high + 1, _NAME, _FAINT))
            self._end += high + gap + (_NAME + 4 if names else 0)

    def png(self) -> bytes:
        """The sheet as a file."""
        sheet = Image.new("RGB", (self._width, self._end + _MARGIN - _GAP), _PAPER)
        for cell, x, y in self._placed:
            sheet.paste(cell, (x, y))
        pen = ImageDraw.Draw(sheet)
        for line, x, y, size, colour in self._written:
            pen.text((x, y), line, colour, font(size))
        raw = io.BytesIO()
        sheet.save(raw, format="PNG")
        return raw.getvalue()


def _pair(original: Tensor, drawn: Tensor) -> Image.Image:
    """One over the other."""
    both = Image.fromarray(torch.cat([original, drawn], dim=1).permute(1, 2, 0).numpy())
    side = both.width
    if side <= _LARGEST:
        factor = _LARGEST // side
        return both.resize((factor * side, 2 * factor * side), Image.Resampling.NEAREST)
    return both.resize((_LARGEST, 2 * _LARGEST), Image.Resampling.BOX)


@torch.no_grad()
def _tokens(model: DVAE, order: Tensor) -> list[Image.Image]:
    """What tokens look like, in this order."""
    device = next(model.parameters()).device
    low = _AROUND // 2 * STRIDE
    cells = []
    for some in torch.split(order, 64):
        grids = some.to(device)[:, None, None].expand(-1, _AROUND, _AROUND)
        middle = as_pixels(model.decode(grids))[:, :, low : low + STRIDE, low : low + STRIDE]
        cells += [Image.fromarray(cell.permute(1, 2, 0).numpy()) for cell in middle.contiguous()]
    return [cell.resize((_TOKEN, _TOKEN), Image.Resampling.NEAREST) for cell in cells]
