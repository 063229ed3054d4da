"""Our fine-tuned models in the shape of Hugging Face's and timm's, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from beit_dist.config.model import BackboneConfig
from beit_dist.models.vit import NORM_EPS, BeitBackbone

ModelT = TypeVar("ModelT", bound=BeitBackbone)

_BLOCK = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.o_proj.",
    "attn.relative_position_bias_table": "relative_position_bias.relative_position_bias_table",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
}
_OTHERS = {
    "cls_token": "beit.embeddings.cls_token",
    "pos_embed": "beit.embeddings.position_embeddings",
    "patch_embed.proj.": "beit.embeddings.patch_embeddings.projection.",
    "rel_pos_bias.": "beit.shared_position_bias.",
}


@torch.no_grad()
def randomise(model: ModelT) -> ModelT:
    """The model with random values in every tensor, statistics included."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict(keep_vars=True).items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("running_var", "norm.weight")):
            tensor.copy_(0.5 + drawn.abs())
        else:
            tensor.copy_(drawn * 0.3)
    return model


def a_batch(config: BackboneConfig, batch: int = 3) -> Tensor:
    """Patches of random images."""
    generator = torch.Generator().manual_seed(2)
    shape = (batch, config.patches, config.patch_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def hf_images(config: BackboneConfig, patches: Tensor) -> Tensor:
    """The same images as peers take them: (B, 3, S, S), normalised."""
    grid, size = config.grid, config.patch_size
    images = patches.view(-1, grid, grid, size, size, 3).permute(0, 5, 1, 3, 2, 4)
    images = images.reshape(-1, 3, config.image_size, config.image_size) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return (images - mean) / std


def hf_config(config: BackboneConfig, *, num_blocks: int = 0, **others: Any) -> Any:
    """Hugging Face's for the same backbone, or for one with another number of blocks."""
    from transformers import BeitConfig

    return BeitConfig(
        hidden_size=config.width,
        num_hidden_layers=num_blocks or config.depth,
        num_attention_heads=config.heads,
        intermediate_size=int(config.width * config.mlp_ratio),
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=NORM_EPS,
        use_absolute_position_embeddings=config.absolute_positions,
        use_relative_position_bias=config.block_positions,
        use_shared_relative_position_bias=config.relative_positions and not config.block_positions,
        layer_scale_init_value=config.layer_scale,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        use_mean_pooling=True,
        **others,
    )


def convolution_of(model: BeitBackbone) -> dict[str, Tensor]:
    """The model's state with the patch embedding as a convolution, as every peer has it."""
    state = dict(model.state_dict())
    size, weight = model.config.patch_size, state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.view(-1, size, size, 3).permute(0, 3, 1, 2)
    return state


def hf_state(model: BeitBackbone, behind: Mapping[str, str]) -> dict[str, Tensor]:
    """The model's state under Hugging Face's names.

    Args:
        behind: beginnings of our names and of theirs, for what stands behind the backbone.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in convolution_of(model).items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            for part, piece in _pieces(rest, tensor).items():
                found[f"beit.layers.{block}.{_renamed(part, _BLOCK)}"] = piece
        else:
            found[_renamed(name, {**_OTHERS, **behind})] = tensor
    return found


def _pieces(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "attn.qkv.weight":
        return dict(zip([f"attention.{p}_proj.weight" for p in "qkv"], tensor.chunk(3), strict=True))
    if name in ("attn.q_bias", "attn.v_bias"):
        return {f"attention.{name[5]}_proj.bias": tensor}
    return {name: tensor}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
