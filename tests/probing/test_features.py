"""Features are what the blocks put out, and to look at them leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from beit_dist.errors import ConfigError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.probing.features import features_of, frozen, layers_of, quarters, width_of

CPU = torch.device("cpu")


def test_features_are_the_class_token_and_the_mean_of_the_patches_of_each_block(model: MaskedImageModel) -> None:
    patches = torch.randint(0, 256, (5, 16, 48), dtype=torch.uint8)
    outputs: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda *given: outputs.append(given[2])) for block in model.blocks]
    with torch.no_grad():
        model.encode(patches)
    for handle in handles:
        handle.remove()
    found = features_of(frozen(model.config, model.state_dict(), CPU), patches, [1, 3])
    assert found.shape == (2, 5, width_of(model.config))
    for got, layer in zip(found, (1, 3), strict=True):
        tokens = outputs[layer - 1]
        torch.testing.assert_close(got, torch.cat((tokens[:, 0], tokens[:, 1:].sum(1) / 16), 1))


def test_nothing_is_drawn_and_no_gradient_is_kept(model: MaskedImageModel) -> None:
    before = torch.get_rng_state()
    backbone = frozen(model.config, model.state_dict(), CPU)
    found = features_of(backbone, torch.zeros(1, 16, 48, dtype=torch.uint8), [3])
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_are_all_or_those_chosen_or_four_over_the_depth() -> None:
    assert layers_of(3, None, "--layers") == (1, 2, 3)
    assert layers_of(12, [12, 3, 3], "--layers") == (3, 12)
    assert [quarters(depth) for depth in (12, 24, 2, 1)] == [(3, 6, 9, 12), (6, 12, 18, 24), (1, 2), (1,)]
    with pytest.raises(ConfigError, match=r"--layers: got 13, expected numbers from 1 \(first block\) to 12"):
        layers_of(12, [3, 13], "--layers")
