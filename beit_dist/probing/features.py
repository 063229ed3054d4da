"""Features of frozen layers: what every probe looks at, of all layers in one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError
from beit_dist.models.vit import BeitBackbone


def layers_of(depth: int, chosen: Sequence[int] | None, field: str) -> tuple[int, ...]:
    """The layers to look at, ascending: those chosen, or all.

    Args:
        depth: of the backbone; its last block's output is the layer of this number.
        field: the setting that names them.

    Raises:
        ConfigError: there is no such layer.
    """
    for layer in chosen or ():
        if not isinstance(layer, int | np.integer) or not 1 <= layer <= depth:
            raise ConfigError(field, layer, f"numbers from 1 (first block) to {depth} (last block)")
    return tuple(sorted(set(chosen))) if chosen else tuple(range(1, depth + 1))


def quarters(depth: int) -> tuple[int, ...]:
    """Four layers, spread over the depth; the last one is the last."""
    return tuple(sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)}))


def width_of(config: BackboneConfig) -> int:
    """Values of an image's features: class token, and mean of the patches."""
    return 2 * config.width


def frozen(config: BackboneConfig, weights: Mapping[str, Tensor], device: torch.device) -> BeitBackbone:
    """A backbone that is not trained, of fp32 weights; those that it does not have are left out.

    Nothing is drawn, so a training in the same process does not notice.
    """
    with torch.device("meta"):
        backbone = BeitBackbone(config, masks=False, final_norm=False)
    backbone.to_empty(device=device)
    own = {name: weights[name].to(device) for name, _ in backbone.named_parameters()}
    backbone.load_state_dict(own, assign=True)
    backbone.reset_constants()
    return backbone.requires_grad_(False).eval()


def pooled(tokens: Tensor) -> Tensor:
    """(B, 1 + P, C) to fp32 (B, 2 · C): the class token, and the mean of the patches' tokens."""
    return torch.cat((tokens[:, 0].float(), tokens[:, 1:].mean(1, dtype=torch.float32)), dim=1)


@torch.no_grad()
def features_of(backbone: BeitBackbone, patches: Tensor, layers: Sequence[int]) -> Tensor:
    """Features of images in several layers, as unilm's ``run_linear_eval.py`` has them, without the final norm.

    Args:
        patches: uint8 (B, P, D), on the backbone's device.
        layers: ascending, from 1.

    Returns:
        fp32 (L, B, 2 · width): the class token, and the mean of the patches' tokens.
    """
    found = []
    for layer, tokens in enumerate(backbone.layers(patches), start=1):
        if layer in layers:
            found.append(pooled(tokens))
        if layer == layers[-1]:
            break
    return torch.stack(found)
