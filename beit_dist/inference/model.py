"""What all loaded models have: images in any form, features of any layer, attention maps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError
from beit_dist.inference.features import Features
from beit_dist.inference.inputs import AnyImages, normalised, patches_of
from beit_dist.inference.preparing import Preparation
from beit_dist.inference.provenance import Provenance
from beit_dist.models.vit import BeitBackbone
from beit_dist.probing.features import layers_of

_NEEDED = {
    "predict": "a model that beit finetune has made",
    "probabilities": "a model that beit finetune has made",
    "logits": "a model that was fine-tuned for a classification",
    "reconstruct": "a pre-trained model",
}
"""Methods of some models alone."""


class LoadedModel(nn.Module):
    """A trained model. Frozen and in evaluation mode; ``requires_grad_(True)`` makes its parameters trainable.

    Nothing in it is drawn at random: there is no dropout, and no stochastic depth.

    Attributes:
        network: the model as it was trained, on patches; ``network.state_dict()`` has unilm's names.
        provenance: where the weights are from, and what is known besides.
        prepare: from an image to uint8 (S, S, 3), S = ``config.image_size``.
    """

    network: BeitBackbone

    def __init__(self, network: BeitBackbone, provenance: Provenance, prepare: Preparation) -> None:
        super().__init__()
        self.network, self.provenance, self.prepare = network, provenance, prepare

    @property
    def config(self) -> BackboneConfig:
        """Sizes, variant, and the normalisation of pixels."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.network.cls_token.device

    @property
    def default_layer(self) -> int:
        """The layer whose features are given if none is named.

        Of a pre-trained model two thirds of the depth: 8 of 12, 16 of 24. The last layers of BEiT predict tokens;
        the paper's linear probes are best at about 9 of 12 and 14 of 24. Of a fine-tuned model the last one, which
        its head reads.
        """
        depth = self.config.depth
        return max(1, round(2 * depth / 3)) if self.provenance.kind == "pretraining" else depth

    def forward(self, images: Tensor) -> Tensor:
        """``features(images).pooled`` of a tensor, (B, 2 · width): an ordinary backbone, to fine-tune."""
        return self.features(images).pooled

    @overload
    def features(self, images: AnyImages, layers: int | None = None) -> Features: ...

    @overload
    def features(self, images: AnyImages, layers: Iterable[int]) -> dict[int, Features]: ...

    def features(
        self, images: AnyImages, layers: int | Iterable[int] | None = None
    ) -> Features | dict[int, Features]:
        """What a layer, or each of several, makes of images, without the last norm; as ``beit probe`` sees them.

        Args:
            images: one or several; see :data:`beit_dist.inference.inputs.AnyImages`.
            layers: a number from 1 (first block) to depth (last block), by default ``default_layer``; or several,
                for a dictionary by layer.

        Raises:
            ConfigError: there is no such layer; or a tensor of another shape, dtype or range.
            DataError: an image cannot be used.
        """
        one = layers is None or isinstance(layers, int | np.integer)
        wanted = layers_of(self.config.depth, self._chosen(layers), "layers")
        found = {}
        for layer, tokens in enumerate(self.network.layers(self.patches_of(images)), start=1):
            if layer in wanted:
                found[layer] = Features(layer, tokens)
            if layer == wanted[-1]:
                break
        return found[wanted[0]] if one else found

    def _chosen(self, layers: int | Iterable[int] | None) -> list[int]:
        if layers is None:
            return [self.default_layer]
        if isinstance(layers, int | np.integer):
            return [int(layers)]
        several = isinstance(layers, Iterable) and not isinstance(layers, str)
        if not several or not (chosen := list(layers)):
            raise ConfigError(
                "layers", layers, f"numbers from 1 (first block) to {self.config.depth} (last block)"
            )
        return chosen

    def attention(self, images: AnyImages, layer: int | None = None) -> Tensor:
        """How much each token attends to each: fp32 (B, heads, 1 + P, 1 + P), rows are queries and sum to 1.

        The relative position bias is part of it. P patches lie row by row behind the class token, so that what
        patch (y, x) attends to is ``maps[:, :, 1 + y * grid + x, 1:].unflatten(-1, (grid, grid))``.

        Args:
            images: one or several; see :data:`beit_dist.inference.inputs.AnyImages`.
            layer: from 1 (first block) to depth, by default the last.

        Raises:
            ConfigError, DataError: as :meth:`features`.
        """
        (chosen,) = layers_of(self.config.depth, [self.config.depth if layer is None else layer], "layer")
        return self.network.attention(self.patches_of(images), chosen)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) or (B, 3, S, S) to fp32 (B, 3, S, S) as the network's input is normalised.

        Raises:
            ConfigError: it is another tensor.
        """
        return normalised(pixels, self.config)

    def patches_of(self, images: AnyImages) -> Tensor:
        """What ``network`` takes, on its device: (B, P, D), uint8, or fp32 between 0 and 255."""
        return patches_of(images, self.prepare, self.device)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in _NEEDED:
            raise AttributeError(f"{type(self).__name__} has no {name}, which needs {_NEEDED[name]}")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Where it is from, and what was assumed."""
        return "\n".join([f"{self.provenance.name!r}, kind={self.provenance.kind!r}", *self.provenance.notes])
