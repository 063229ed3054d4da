"""Groups of the optimizer: layers learn the slower the deeper they lie, and every parameter is in one group."""

from __future__ import annotations

import pytest
import torch

from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.models.classifier import ImageClassifier
from beit_dist.models.layer_decay import layer_groups
from beit_dist.models.mim import MaskedImageModel

SMALL = {"width": 16, "depth": 3, "heads": 2, "image_size": 16, "patch_size": 8}

SHARES = {
    "cls_token": 4,
    "pos_embed": 4,
    "patch_embed.proj.weight": 4,
    "blocks.0.attn.qkv.weight": 3,
    "blocks.1.gamma_1": 2,
    "blocks.2.attn.relative_position_bias_table": 1,
    "blocks.2.norm2.bias": 1,
    "fc_norm.weight": 0,
    "head.weight": 0,
    "head.bias": 0,
}
"""How many times the decay is applied: layer 0 is before the blocks, i + 1 block i, and depth + 1 behind them."""


def test_a_layer_learns_at_the_decay_to_the_power_of_the_layers_above_it() -> None:
    model = ImageClassifier(BackboneConfig(**SMALL, absolute_positions=True, block_positions=True), 5)
    groups = layer_groups(model, 0.05, 0.65, 3)
    shares = {name: group["lr_share"] for group in groups for name, _ in group["params"]}
    assert {name: shares[name] for name in SHARES} == {
        name: pytest.approx(0.65**power) for name, power in SHARES.items()
    }
    for group in groups:
        powers = {power for name, power in SHARES.items() if name in dict(group["params"])}
        assert len(powers) <= 1, group["name"]
    assert [group["name"] for group in groups][:3] == ["layer_0_decay", "layer_0_no_decay", "layer_1_decay"]
    assert len({group["name"] for group in groups}) == len(groups) == 2 * 5


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_every_parameter_is_in_one_group_that_decays_what_unilm_decays(decay: float) -> None:
    model = ImageClassifier(BackboneConfig(**SMALL, absolute_positions=True, block_positions=True), 5)
    groups = layer_groups(model, 0.05, decay, 3)
    found = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in found) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter is model.get_parameter(name) for name, parameter in found)
    decayed = {name for group in groups if group["weight_decay"] == 0.05 for name, _ in group["params"]}
    spared = {name for group in groups if group["weight_decay"] == 0 for name, _ in group["params"]}
    matrices = {"attn.qkv.weight", "attn.proj.weight", "attn.relative_position_bias_table"}
    matrices |= {"mlp.fc1.weight", "mlp.fc2.weight"}
    assert decayed == {f"blocks.{i}.{name}" for i in range(3) for name in matrices} | {
        "patch_embed.proj.weight",
        "head.weight",
    }
    assert decayed | spared == {name for name, _ in found}


def test_without_layer_decay_there_are_two_groups_at_the_whole_rate() -> None:
    groups = layer_groups(ImageClassifier(BackboneConfig(**SMALL), 5), 0.05, 1.0, 3)
    assert [(group["name"], group["lr_share"]) for group in groups] == [("decay", 1.0), ("no_decay", 1.0)]


def test_a_table_shared_by_all_blocks_learns_with_the_head() -> None:
    with torch.device("meta"):
        model = MaskedImageModel(ModelConfig(**SMALL))
    shares = {name: g["lr_share"] for g in layer_groups(model, 0.05, 0.5, 3) for name, _ in g["params"]}
    assert shares["rel_pos_bias.relative_position_bias_table"] == shares["lm_head.weight"] == 1
    assert shares["mask_token"] == 0.5**4
