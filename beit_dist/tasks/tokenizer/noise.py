"""The random numbers of a tokenizer's training: a function of seed, step and row, so there is no state to save."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from beit_dist.draws import Purpose, words
from beit_dist.models.dvae_objective import gumbel_noise

_WEIGHTS, _NOISE = 0, 2
"""Last integer of the keys, so that the two draws are independent."""


def weights_seed(seed: int) -> int:
    """Seed of the initial weights."""
    return _short(seed, 0, 0, _WEIGHTS)


def noise_of_rows(seed: int, step: int, rows: range, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel noise ``(rows, *shape)`` of rows of the whole batch of ``step``; the ranks do not matter.

    Args:
        generator: seeded anew for each row; its device draws, and a GPU draws other numbers than a CPU.
    """
    noise = torch.empty(len(rows), *shape, device=generator.device)
    for place, row in enumerate(rows):
        generator.manual_seed(_short(seed, step, row, _NOISE))
        noise[place] = gumbel_noise(shape, generator)
    return noise


def _short(seed: int, *key: int) -> int:
    """A seed for a torch generator, which takes 63 bits."""
    return int(words(seed, Purpose.TOKENIZER_NOISE, key, 1)[0] >> np.uint64(1))
