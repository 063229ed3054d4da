"""What a BEiT model is made of: its backbone, and the head of pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from beit_dist.config.pixels import PixelsConfig
from beit_dist.config.reading import Section
from beit_dist.errors import ConfigError

Unit = tuple[float, float, float]


HALF: Unit = (0.5, 0.5, 0.5)
"""Mean and deviation of the released 22k models (unilm ``IMAGENET_INCEPTION_MEAN``)."""


IMAGENET_MEAN: Unit = (0.485, 0.456, 0.406)


IMAGENET_STD: Unit = (0.229, 0.224, 0.225)


_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}


class BackboneConfig(Section):
    """The BEiT v1 backbone (arXiv 2106.08254). The defaults are those of the released code."""

    size: Literal["tiny", "small", "base", "large"] = "base"
    """Sets ``width``, ``depth`` and ``heads`` if they are not given: tiny 192/12/3, small 384/12/6, base
    768/12/12, large 1024/24/16."""
    width: int = Field(0, ge=0)
    """Width of the embeddings. 0 takes that of ``size``."""
    depth: int = Field(0, ge=0)
    """Number of transformer blocks. 0 takes that of ``size``."""
    heads: int = Field(0, ge=0)
    """Attention heads, a divisor of ``width``. 0 takes that of ``size``."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of the hidden layer of each MLP, as a multiple of ``width``."""
    image_size: int = Field(224, gt=0)
    """Side of the square image, in pixels. Must match the shards."""
    patch_size: int = Field(16, gt=0)
    """Side of a patch, in pixels: a divisor of ``image_size``. Must match the shards."""
    absolute_positions: bool = False
    """Learned absolute position embeddings, as in the paper's ImageNet-1k models."""
    relative_positions: bool = True
    """One table of relative position biases, shared by all blocks, as in the released code."""
    block_positions: bool = False
    """Each block has its own table of relative position biases instead of the shared one, as in fine-tuned models
    (unilm ``--rel_pos_bias``)."""
    layer_scale: float = Field(0.1, ge=0)
    """Initial value of LayerScale; 0 leaves it out. The released code uses 0.1 for base and 1e-5 for large."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic-depth rate of the last block. It rises linearly from 0 at the first."""
    pixel_mean: Unit = HALF
    """Mean of the pixel normalisation: red, green, blue, on a scale of 0 to 1."""
    pixel_std: Unit = HALF
    """Standard deviation of the pixel normalisation: red, green, blue, on a scale of 0 to 1."""

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name, number in _SIZES.get(filled.get("size", "base"), {}).items():
            if not filled.get(name):
                filled[name] = number
        return filled

    @model_validator(mode="after")
    def _check(self) -> BackboneConfig:
        if self.image_size % self.patch_size:
            raise ConfigError(
                "model.patch_size", self.patch_size, f"a divisor of model.image_size ({self.image_size})"
            )
        if self.width % self.heads:
            raise ConfigError("model.heads", self.heads, f"a divisor of model.width ({self.width})")
        if self.block_positions and not self.relative_positions:
            raise ConfigError(
                "model.block_positions",
                True,
                "model.relative_positions=true beside it, or model.block_positions=false",
            )
        if not all(deviation > 0 for deviation in self.pixel_std):
            raise ConfigError("model.pixel_std", self.pixel_std, "three numbers above 0")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side of the image; equal to the side of the visual-token grid."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def patch_bytes(self) -> int:
        """uint8 values of a patch: ``patch_size² · 3``."""
        return 3 * self.patch_size**2

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Stochastic-depth rate of each block (unilm: ``linspace(0, drop_path, depth)``)."""
        last = max(1, self.depth - 1)
        return tuple(self.drop_path * block / last for block in range(self.depth))


class ModelConfig(BackboneConfig):
    """The BEiT v1 backbone and the head that predicts masked patches."""

    target: str = "tokens"
    """What the model predicts for a masked patch: its visual token, or its pixels."""
    vocabulary: int = Field(8192, ge=2, le=32768)
    """Number of visual tokens. Must match the tokenizer. Used by ``target: tokens`` only."""
    pixels: PixelsConfig = PixelsConfig()
