"""What a layer makes of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """One layer's output of B images, C being the model's width. All are fp32, and gradients flow through them."""

    layer: int
    """1: the first block."""
    tokens: Tensor
    """(B, 1 + height · width, C): the class token first, then the patches row by row; in the model's dtype."""

    @property
    def class_token(self) -> Tensor:
        """(B, C)"""
        raise NotImplementedError

    @property
    def patch_mean(self) -> Tensor:
        """(B, C): the mean of the patches."""
        raise NotImplementedError

    @property
    def patch_grid(self) -> Tensor:
        """(B, C, height, width), as convolutions take it."""
        raise NotImplementedError

    @property
    def pooled(self) -> Tensor:
        """(B, 2 · C): class token, then mean of the patches; what ``beit probe`` looks at."""
        raise NotImplementedError
