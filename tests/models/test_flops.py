"""The analytic FLOPs against PyTorch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_dist.config.model import ModelConfig
from beit_dist.engine.task import OPERATIONS
from beit_dist.models.flops import multiply_adds
from beit_dist.models.heads.targets import HEADS
from beit_dist.models.mim import MaskedImageModel


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("relative", [True, False])
def test_flops_equal_pytorchs_count_but_for_the_gradient_of_the_pixels(relative: bool, target: str) -> None:
    config = ModelConfig(
        width=48,
        depth=3,
        heads=2,
        image_size=64,
        vocabulary=96,
        mlp_ratio=3,
        relative_positions=relative,
        target=target,
    )
    batch, masked = 2, 7
    model = MaskedImageModel(config)
    patches = torch.zeros(batch, config.patches, config.patch_bytes, dtype=torch.uint8)
    tokens = torch.zeros(batch, config.patches, dtype=torch.int16)
    positions = torch.arange(masked).expand(batch, masked)
    with FlopCounterMode(display=False) as counter:
        model(patches, tokens, positions)[0].backward()
    pixel_gradient = 2 * config.patches * config.patch_bytes * config.width
    counted = counter.get_total_flops() / batch
    assert counted == OPERATIONS * multiply_adds(config, masked) - pixel_gradient


def test_base_takes_the_published_multiply_adds() -> None:
    backbone = multiply_adds(ModelConfig(size="base"), masked=0) / 1e9
    assert backbone == pytest.approx(17.6, rel=0.01)  # mmpretrain's figure for BEiT-base, forward
