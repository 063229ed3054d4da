"""A head that paints: the normalised pixels of a masked patch, by regression.

BEiT's ablation has it (arXiv 2106.08254, "recover pixels"). One linear layer, as in SimMIM (arXiv 2111.09886).
The loss of a patch is the mean over its values, as in MAE (arXiv 2111.06377, section 3) and SimMIM.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.models.heads.base import LOSS, Counts, Head
from beit_dist.models.normalisation import Normalisation
from beit_dist.step_numbers import Baseline, Baselines

VARIANCE_FLOOR = 1e-6
"""Added to a patch's variance (MAE, ``models_mae.py``), which is 0 where the patch has one colour."""


class PixelsHead(Head):
    """Smooth L1 or squared error of the pixels of masked patches, whose tokens it does not look at."""

    name = "pixel_head"
    numbers = (LOSS,)
    settings = frozenset({"pixels.loss", "pixels.beta", "pixels.normalise_patches"})

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.normalise = Normalisation(config)

    @classmethod
    def outputs(cls, config: ModelConfig) -> int:
        """D, the values of a patch in the order of a shard."""
        return config.patch_bytes

    @classmethod
    def uses(cls, config: ModelConfig) -> frozenset[str]:
        """All but ``beta``, if the error is squared."""
        return cls.settings - ({"pixels.beta"} if config.pixels.loss == "mse" else set())

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        """How many values, normalised how, and the loss."""
        pixels = config.pixels
        by = (
            "each by its own mean and deviation"
            if pixels.normalise_patches
            else "by model.pixel_mean and pixel_std"
        )
        loss = "squared error" if pixels.loss == "mse" else f"smooth L1 with beta {pixels.beta:g}"
        return f"the {config.patch_bytes} values of a masked patch, normalised {by}; {loss}"

    @classmethod
    def baselines(cls, config: ModelConfig, known: Counts | None, scored: Counts | None = None) -> Baselines:
        """``mean colour``: the one colour that costs least on the training data, in every patch.

        None where each patch is normalised by itself, which the counts of a data set do not tell.
        """
        if known is None or config.pixels.normalise_patches:
            return {}
        answered = scored or known
        levels, found = np.arange(256) / 255, 0.0
        for channel in range(3):
            seen, there = known.pixels[channel], answered.pixels[channel]
            if not seen.sum() or not there.sum():
                return {}
            values = torch.from_numpy((levels - config.pixel_mean[channel]) / config.pixel_std[channel])
            errors = _errors(config, values[:, None].expand(256, 256), values.expand(256, 256)).numpy()
            answer = int((errors @ seen).argmin())
            found += float(errors[answer] @ (there / there.sum())) / 3
        return {"loss": [Baseline("mean colour", found)]}

    def reset_constants(self) -> None:
        """The normalisation's."""
        self.normalise.reset_constants()

    def score(self, predicted: Tensor, patches: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """The sum of the patches' mean errors."""
        chosen = positions.long().clamp(min=0).unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        target = self.target(patches.gather(1, chosen))
        errors = _errors(self.config, predicted.float(), target)
        return (errors.mean(-1).masked_fill(positions < 0, 0.0).sum(),)

    def target(self, patches: Tensor) -> Tensor:
        """What is to be predicted of uint8 patches (..., D): fp32 of the same shape."""
        values: Tensor = self.normalise(patches)
        if not self.config.pixels.normalise_patches:
            return values
        mean, deviation = _spread(values)
        return (values - mean) / deviation

    @torch.no_grad()
    def paint(self, predicted: Tensor, patches: Tensor) -> Tensor:
        """The reverse of :meth:`target`: predictions (..., D) as uint8.

        Args:
            predicted: for the patches.
            patches: the true ones. Where each is normalised by itself its mean and deviation are taken from it,
                since they are not predicted (as MAE draws its pictures).
        """
        values = predicted.float()
        if self.config.pixels.normalise_patches:
            mean, deviation = _spread(self.normalise(patches))
            values = values * deviation + mean
        return self.normalise.reverse(values).round().clamp(0, 255).to(torch.uint8)


def _errors(config: ModelConfig, predicted: Tensor, target: Tensor) -> Tensor:
    """Of each value."""
    if config.pixels.loss == "mse":
        return F.mse_loss(predicted, target, reduction="none")
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=config.pixels.beta)


def _spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, (..., 1)."""
    variance, mean = torch.var_mean(values, dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_FLOOR).sqrt()
