"""How good a tokenizer is: reconstructions and use of the codebook on held-out images, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit_dist.engine.task import Surroundings
from beit_dist.models.dvae import DVAE
from beit_dist.models.dvae_objective import psnr
from beit_dist.models.verdict import TokenUse

_AT_ONCE = 32


@dataclass(frozen=True)
class Quality:
    """A tokenizer measured on held-out images."""

    psnr: float
    """dB, of reconstructions from hard tokens."""
    counts: Tensor
    """int64 ``(V,)``: how often each token occurs."""

    @property
    def use(self) -> TokenUse:
        """Of the codebook."""
        return TokenUse.of(self.counts.numpy())

    def facts(self) -> dict[str, Any]:
        """As JSON takes it."""
        use = self.use
        return {
            "psnr": self.psnr,
            "perplexity": use.perplexity,
            "used": use.used,
            "vocabulary": use.vocabulary,
            "dead": use.vocabulary - use.used,
            "commonest_share": use.commonest_share,
        }


def measure(model: DVAE, images: Tensor, around: Surroundings, *, whole: bool = False) -> Quality | None:
    """Quality on uint8 images ``(N, 3, H, W)``, the same on every rank; None if one was asked to stop. Collective.

    Each rank takes its share of the images; the sums are of integers, so the ranks do not change the numbers.

    Args:
        whole: do not look for stop requests.
    """
    rank, world = around.ranks.rank, around.ranks.world
    counts = torch.zeros(model.config.vocabulary, dtype=torch.int64)
    error = 0
    own = images[len(images) * rank // world : len(images) * (rank + 1) // world]
    for turn in range(math.ceil(len(images) / world / _AT_ONCE)):
        if not whole and any(around.agreement.gather(around.stop.requested)):
            return None
        some = own[turn * _AT_ONCE : (turn + 1) * _AT_ONCE]
        if not len(some):
            continue
        tokens, drawn = redrawn(model, some)
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        error += int((drawn.int() - some.int()).square().sum(dtype=torch.int64))
        around.alive()
    found = around.agreement.gather_numbers([*counts.tolist(), error])  # exact in float64 below 2⁵³
    summed = torch.tensor(found, dtype=torch.float64).sum(0)
    return Quality(psnr(float(summed[-1]) / (255**2 * images.numel())), summed[:-1].long())


def redrawn(model: DVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of uint8 images, and what they decode to, uint8 on the CPU."""
    tokens = model.tokens(images.to(next(model.parameters()).device))
    return tokens, as_pixels(model.decode(tokens))


def as_pixels(drawn: Tensor) -> Tensor:
    """Decoded images in [0, 1] as uint8 on the CPU."""
    return (drawn * 255).round().to(torch.uint8).cpu()
