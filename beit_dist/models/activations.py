"""How much memory a forward pass keeps for its backward pass, from the configuration alone."""

from __future__ import annotations

from beit_dist.config.model import BackboneConfig


def backbone_activation_bytes(config: BackboneConfig, size: int, recompute: bool) -> int:
    """Estimate of what the backbone keeps of one image.

    A block keeps about 17 values per token and channel (two norms, qkv, attention's result, two projections,
    and the four-fold hidden layer before and after GELU).

    Args:
        size: bytes of a value in the model's precision.
        recompute: only each block's input is kept, and one block at a time.
    """
    tokens = (1 + config.patches) * config.width * size
    block = 17 * tokens
    return config.depth * tokens + block if recompute else config.depth * block
