"""timm's ``Beit`` at the size of one of our models."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from support.torchvision_stub import stand_in_for_torchvision

from beit_dist.config.model import ModelConfig


def timm_beit_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's class; torchvision, which timm imports for data only, is a stub where it cannot be loaded."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install --no-deps timm")
    stand_in_for_torchvision(monkeypatch)
    from timm.models.beit import Beit

    return Beit


def timm_settings(config: ModelConfig, *, shared_bias: bool = False) -> dict[str, Any]:
    """Its arguments for a model like ours.

    Args:
        config: our model's.
        shared_bias: one table of relative positions for all blocks, as the original's pre-training has.
    """
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "num_classes": 0,
        "global_pool": "token",
        "init_values": config.layer_scale or None,
        "use_abs_pos_emb": config.absolute_positions,
        "use_shared_rel_pos_bias" if shared_bias else "use_rel_pos_bias": config.relative_positions,
    }
