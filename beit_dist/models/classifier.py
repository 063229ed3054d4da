"""The fine-tuned classifier: the backbone, the mean of its patches, a fresh norm and a linear head.

As in the original (unilm ``beit/modeling_finetune.py`` with ``--use_mean_pooling``), whose names the parameters
have. The final norm of pre-training is not used, as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beit_dist.config.model import BackboneConfig
from beit_dist.models.flops import backbone_multiply_adds
from beit_dist.models.initial_values import INIT_STD, fill, finetuning_value, generator_of, normal
from beit_dist.models.vit import NORM_EPS, BeitBackbone

HEAD_INIT_SCALE = 0.001
"""What the head's first weights are multiplied by (unilm ``--init_scale``)."""


class ImageClassifier(BeitBackbone):
    """One logit a class, from the mean of the patches behind the last block.

    Args:
        config: sizes and variant of the backbone.
        classes: K, their number.
        recompute: see :class:`BeitBackbone`.
        head_init_scale: of the head's first weights: small, so that all classes begin as likely.
    """

    def __init__(
        self,
        config: BackboneConfig,
        classes: int,
        *,
        recompute: bool = False,
        head_init_scale: float = HEAD_INIT_SCALE,
    ) -> None:
        super().__init__(config, recompute=recompute, masks=False, final_norm=False)
        self.head_init_scale = head_init_scale
        self.fc_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, classes)

    def forward(self, patches: Tensor, keeps: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits (B, K).

        Args:
            patches: (B, P, D), uint8 as they lie in a shard, or float on the same scale.
            keeps: (B, depth, 2) stochastic-depth keeps; see :meth:`BeitBackbone.encode`.
        """
        pooled = self.encode(patches, keeps=keeps)[:, 1:].mean(1)
        logits: Tensor = self.head(self.fc_norm(pooled))
        return logits

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter, keyed by ``seed`` and the parameter's name: the same on every rank."""
        self.reset_constants()

        def draw(name: str, shape: Sequence[int]) -> Tensor:
            if name == "head.weight":
                return normal(shape, INIT_STD * self.head_init_scale, generator_of(seed, name))
            return finetuning_value(name, shape, self.config, seed)

        fill(self, draw)


def multiply_adds(config: BackboneConfig, classes: int) -> int:
    """Multiply-adds of one image's forward pass."""
    return backbone_multiply_adds(config) + config.width * classes
