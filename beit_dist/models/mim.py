"""Masked image modelling: predict something of masked patches (arXiv 2106.08254, section 2.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.models.heads.base import Head
from beit_dist.models.heads.targets import head_of
from beit_dist.models.initial_values import fill, pretraining_value
from beit_dist.models.layer_decay import layer_groups
from beit_dist.models.vit import BeitBackbone


class MaskedImageModel(BeitBackbone):
    """The backbone with the head that ``config.target`` names.

    The head sits on the backbone itself, so that parameters have unilm's names, without a prefix.
    K is the number of positions given per sample.

    Raises:
        ConfigError: there is no such target.
    """

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        super().__init__(config, recompute=recompute)
        head = head_of(config)(config)
        self._head_name = head.name
        self.add_module(head.name, head)
        self._score = head.score

    @property
    def head(self) -> Head:
        """The head, whatever its name."""
        found: Head = getattr(self, self._head_name)
        return found

    def forward(  # type: ignore[override]
        self, patches: Tensor, tokens: Tensor, positions: Tensor, keeps: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The head's sums over the masked patches, in the order of its ``numbers``: first the loss.

        Args:
            patches: (B, P, D) uint8 as they lie in a shard.
            tokens: (B, P) integers in [0, vocabulary).
            positions: (B, K) integers, the masked patches; -1 is padding and counts for nothing.
            keeps: (B, depth, 2) stochastic-depth keeps; see :meth:`BeitBackbone.encode`.

        Returns:
            fp32 scalars on the model's device.
        """
        return self._score(self.predict(patches, positions, keeps), patches, tokens, positions)

    def compile_score(self, backend: str = "inductor") -> None:
        """Have the head's sums compiled at their first call: one pass over its predictions for several."""
        self._score = torch.compile(self.head.score, backend=backend, dynamic=False)

    def predict(self, patches: Tensor, positions: Tensor, keeps: Tensor | None = None) -> Tensor:
        """The head's predictions (B, K, O) for the masked patches; those for padding mean nothing."""
        encoded = self.encode(patches, masked_patches(positions, self.config.patches), keeps)
        batch, length, width = encoded.shape
        rows = positions.long().clamp(min=0) + 1  # behind the class token; padding reads some patch's row
        rows = rows + length * torch.arange(batch, device=rows.device).unsqueeze(1)
        chosen = encoded.reshape(-1, width).index_select(0, rows.flatten())
        predicted: Tensor = self.head(chosen)
        return predicted.view(batch, -1, predicted.shape[-1])

    def reset_constants(self) -> None:
        """Compute all buffers anew, for a module that was built on the meta device."""
        super().reset_constants()
        self.head.reset_constants()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter, keyed by ``seed`` and the parameter's name: the same on every rank."""
        self.reset_constants()
        fill(self, lambda name, shape: pretraining_value(name, shape, self.config, seed))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups ``decay`` and ``no_decay``; see :func:`layer_groups`."""
        return layer_groups(self, weight_decay, 1.0, self.config.depth)


def masked_patches(positions: Tensor, patches: int) -> Tensor:
    """Positions (B, K), padded with -1, as a mask: (B, patches) bool."""
    everywhere = torch.arange(patches, device=positions.device, dtype=positions.dtype)
    return (positions.unsqueeze(-1) == everywhere).any(dim=1)
