"""How much arithmetic a training step is, from the configuration alone."""

from __future__ import annotations

from beit_dist.config import ModelConfig


def multiply_adds(config: ModelConfig, masked: int) -> int:
    """Multiply-adds of one image's forward pass: the backbone, and the head on ``masked`` patches.

    Matrix products only; norms, softmax, GELU and other element-wise work are left out, as is usual.
    """
    width, tokens = config.width, 1 + config.patches
    hidden = int(width * config.mlp_ratio)
    embedding = config.patches * config.patch_bytes * width
    projections = tokens * (4 * width * width + 2 * width * hidden)
    attention = 2 * tokens * tokens * width
    head = masked * width * config.vocabulary
    return embedding + config.depth * (projections + attention) + head


def flops_per_image(config: ModelConfig, masked: int) -> int:
    """Floating-point operations to train on one image: 6 × :func:`multiply_adds`.

    A multiply-add is two operations, and the backward pass takes two products for each of the forward's. The
    pixels need no gradient, so the patch embedding's backward takes only one: counted in full here, as
    published figures are, it is 0.2 % of BEiT-base.
    """
    return 6 * multiply_adds(config, masked)
