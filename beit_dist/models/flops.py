"""How much arithmetic a training step is, from the configuration alone."""

from __future__ import annotations

from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.models.heads.targets import head_of


def multiply_adds(config: ModelConfig, masked: int) -> int:
    """Multiply-adds of one image's forward pass: the backbone, and the head on ``masked`` patches."""
    return backbone_multiply_adds(config) + head_of(config).multiply_adds(config, masked)


def backbone_multiply_adds(config: BackboneConfig) -> int:
    """Multiply-adds of one image's forward pass through the backbone.

    Matrix products only; norms, softmax, GELU and other element-wise work are left out, as is usual.
    """
    width, tokens = config.width, 1 + config.patches
    hidden = int(width * config.mlp_ratio)
    embedding = config.patches * config.patch_bytes * width
    projections = tokens * (4 * width * width + 2 * width * hidden)
    attention = 2 * tokens * tokens * width
    return embedding + config.depth * (projections + attention)
