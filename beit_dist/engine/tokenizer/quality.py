"""How good a tokenizer is: reconstructions and use of the codebook on held-out images, in numbers and pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from beit_dist.engine.distributed import Agreement
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.objective import perplexity, psnr

_SHOWN = 8
"""Columns of the picture of reconstructions."""
_AT_ONCE = 32


@dataclass(frozen=True)
class Quality:
    """A tokenizer measured on held-out images."""

    psnr: float
    """dB, of reconstructions from hard tokens."""
    perplexity: float
    """exp of the entropy of the tokens' frequencies."""
    used: int
    """Tokens that occur at all."""
    vocabulary: int

    @property
    def dead(self) -> int:
        """Tokens that do not occur."""
        return self.vocabulary - self.used


def measure(
    model: DVAE, images: Tensor, agreement: Agreement, alive: Callable[[], None] = lambda: None
) -> Quality:
    """Quality on uint8 images ``(N, 3, H, W)``, the same on every rank. Collective.

    Each rank takes its share of the images; the sums are of integers, so the ranks do not change the numbers.

    Args:
        alive: called now and then.
    """
    rank, world = agreement.ranks.rank, agreement.ranks.world
    counts = torch.zeros(model.config.vocabulary, dtype=torch.int64)
    error = 0
    own = images[len(images) * rank // world : len(images) * (rank + 1) // world]
    for some in torch.split(own, _AT_ONCE) if len(own) else ():
        tokens, drawn = _redrawn(model, some)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        error += int((drawn.int() - some.int()).square().sum(dtype=torch.int64))
        alive()
    found = agreement.gather_numbers([*counts.tolist(), error])  # exact in float64 below 2⁵³
    summed = torch.tensor(found, dtype=torch.float64).sum(0)
    counts = summed[:-1].long()
    squares = float(summed[-1]) / (255**2 * images.numel())
    return Quality(psnr(squares), perplexity(counts), int((counts > 0).sum()), len(counts))


def picture(model: DVAE, images: Tensor) -> bytes:
    """A PNG of the first few images over their reconstructions from hard tokens."""
    originals = images[:_SHOWN]
    rows = torch.stack([originals, _redrawn(model, originals)[1]])  # (2, n, 3, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    raw = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(raw, format="PNG")
    return raw.getvalue()


def _redrawn(model: DVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of uint8 images, and what they decode to, uint8 on the CPU."""
    tokens = model.tokens(images.to(next(model.parameters()).device))
    return tokens, (model.decode(tokens) * 255).round().to(torch.uint8).cpu()
