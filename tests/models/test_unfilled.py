"""A model without PyTorch's first values is the same once it has its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.models.classifier import ImageClassifier
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.unfilled import unfilled

SIZES = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8, "pixel_mean": (0.1, 0.2, 0.3)}


@pytest.mark.parametrize(
    "build",
    [
        lambda: MaskedImageModel(ModelConfig(**SIZES, vocabulary=64)),
        lambda: MaskedImageModel(ModelConfig(**SIZES, target="pixels", absolute_positions=True)),
        lambda: ImageClassifier(BackboneConfig(**SIZES, block_positions=True), 5),
    ],
    ids=["tokens", "pixels", "classes"],
)
def test_every_parameter_and_buffer_is_set(build: Callable[[], MaskedImageModel]) -> None:
    # What memory holds is left to chance; here it is nothing that a model could hold.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        model = unfilled(build)
    finally:
        torch.use_deterministic_algorithms(False)
    usual = build()
    for each in (model, usual):
        each.initialise(3)
    tensors = [dict(each.named_parameters()) | dict(each.named_buffers()) for each in (usual, model)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][name], tensor), name
    assert all(tensor.device.type == "cpu" for tensor in tensors[1].values())
    assert all(parameter.requires_grad for parameter in model.parameters())
