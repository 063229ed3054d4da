"""A batch of made-up samples."""

from __future__ import annotations

import torch

from beit_dist.config.model import ModelConfig

MASKED = 75
"""Masked patches of an image, of 196 (arXiv 2106.08254, section 2.3: about 40 %)."""


def inputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random (patches, tokens, positions) of a batch, on the device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, config.patches, config.patch_bytes), generator=generator)
    tokens = torch.randint(0, config.vocabulary, (batch, config.patches), generator=generator)
    positions = torch.stack([torch.randperm(config.patches, generator=generator)[:MASKED] for _ in range(batch)])
    return pixels.to(device, torch.uint8), tokens.to(device, torch.int16), positions.to(device, torch.int16)
