"""The analytic FLOPs against PyTorch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_dist.config import ModelConfig
from beit_dist.models.flops import flops_per_image, multiply_adds
from beit_dist.models.mim import MaskedImageModel


@pytest.mark.parametrize("relative", [True, False])
def test_flops_equal_pytorchs_count_but_for_the_gradient_of_the_pixels(relative: bool) -> None:
    config = ModelConfig(
        width=48, depth=3, heads=2, image_size=64, vocabulary=96, mlp_ratio=3, relative_positions=relative
    )
    batch, masked = 2, 7
    model = MaskedImageModel(config)
    patches = torch.zeros(batch, config.patches, config.patch_bytes, dtype=torch.uint8)
    tokens = torch.zeros(batch, config.patches, dtype=torch.int16)
    positions = torch.arange(masked).expand(batch, masked)
    with FlopCounterMode(display=False) as counter:
        model(patches, tokens, positions).loss_sum.backward()
    pixel_gradient = 2 * config.patches * config.patch_bytes * config.width
    counted = counter.get_total_flops() / batch
    assert counted == flops_per_image(config, masked) - pixel_gradient


def test_base_takes_the_published_multiply_adds() -> None:
    backbone = multiply_adds(ModelConfig(size="base"), masked=0) / 1e9
    assert backbone == pytest.approx(17.6, rel=0.01)  # mmpretrain's figure for BEiT-base, forward
