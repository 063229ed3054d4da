"""Mixup and CutMix in pairs: row i of the global batch with row i xor 1, on the device.

Every draw belongs to a pair's place in the run, so neither ranks nor restarts change it. Shares and boxes follow
timm's ``Mixup`` in its ``pair`` mode, which unilm fine-tunes with in its ``batch`` mode.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_dist.config.finetuning import MixingConfig
from beit_dist.draws import Purpose, uniforms, words


class Mixture(NamedTuple):
    """How R rows are mixed with their partners."""

    blends: Tensor
    """float32 (R,): share of a row's own pixels everywhere outside its box."""
    boxes: Tensor
    """int64 (R, 4): top, left, bottom and right of the partner's part, in pixels; empty where there is none."""
    shares: Tensor
    """float32 (R,): what is left of a row's own target."""

    def of(self, rows: slice, device: torch.device) -> Mixture:
        """That of some of the rows, on a device."""
        return Mixture(*(each[rows].to(device, non_blocking=True) for each in self))


def draw_mixture(config: MixingConfig, seed: int, first: int, rows: range, side: int) -> Mixture:
    """The mixture of consecutive rows of a global batch; both rows of a pair are there.

    Args:
        first: samples trained on before the batch.
        rows: even number of rows, the first one even.
        side: of the images, in pixels.
    """
    pairs = [
        _draw_pair(config, uniforms(words(seed, Purpose.MIXING, (first + row,), 6)), side) for row in rows[::2]
    ]
    blends, boxes, shares = zip(*pairs, strict=True)
    return Mixture(
        torch.tensor(blends, dtype=torch.float32).repeat_interleave(2),
        torch.tensor(boxes, dtype=torch.int64).repeat_interleave(2, dim=0),
        torch.tensor(shares, dtype=torch.float32).repeat_interleave(2),
    )


def mix_patches(patches: Tensor, partners: Tensor, mixture: Mixture, patch_size: int) -> Tensor:
    """Rows mixed with their partners: float32 (R, P, D) in 0..255.

    Args:
        patches: uint8 (R, P, D), P patches of a square image in rows, D values: y, x, channel.
        partners: the same of the partners.
    """
    own = mixture.blends[:, None, None]
    mixed = patches.float() * own + partners.float() * (1 - own)
    y, x = _places(patches.shape[1], patch_size, patches.device)
    top, left, bottom, right = (edge[:, None, None] for edge in mixture.boxes.unbind(1))
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return torch.where(inside, partners.float(), mixed)


def _places(patches: int, patch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(P, D) each: row and column in the image of every value of its patches."""
    grid = round(patches**0.5)
    number = torch.arange(patches, device=device)[:, None]
    inner = (torch.arange(3 * patch_size**2, device=device) // 3)[None]
    y = number // grid * patch_size + inner // patch_size
    x = number % grid * patch_size + inner % patch_size
    return y, x


def _draw_pair(
    config: MixingConfig, draws: NDArray[np.float64], side: int
) -> tuple[float, tuple[int, int, int, int], float]:
    """A pair's blend, box and share."""
    whether, which, first, second, y, x = map(float, draws)
    if whether >= config.probability or not config.active:
        return 1.0, (0, 0, 0, 0), 1.0
    if config.mixup and not (config.cutmix and which < config.switch):
        blend = _symmetric_beta(config.mixup, first, second)
        return blend, (0, 0, 0, 0), blend
    cut = _round_down(side * (1 - _symmetric_beta(config.cutmix, first, second)) ** 0.5)
    top, left = (int(side * centre) - cut // 2 for centre in (y, x))
    box = (max(0, top), max(0, left), min(side, top + cut), min(side, left + cut))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 1.0, box, 1 - area / side**2


def _round_down(value: float) -> int:
    """To an even number of pixels, so that a box lies evenly around its centre."""
    return int(value) // 2 * 2


def _symmetric_beta(parameter: float, first: float, second: float) -> float:
    """A draw of Beta(a, a), a > 1/2, from two uniform ones (Ulrich's method; Devroye, "Non-Uniform Random Variate
    Generation", 1986, chapter IX.4)."""
    radius = (1 - first ** (2 / (2 * parameter - 1))) ** 0.5
    return float(0.5 + 0.5 * radius * np.cos(2 * np.pi * second))
