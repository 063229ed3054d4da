"""Parity with Hugging Face and timm on the same weights; names there and back without a bit lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.timm_beit import timm_beit_class, timm_settings
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.errors import WeightsError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.weights.names import TABLE, from_hf, from_unilm, to_hf, to_timm, to_unilm

SMALL = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}
RELEASED = ModelConfig(**SMALL)
PAPER = ModelConfig(**SMALL, absolute_positions=True, relative_positions=False, layer_scale=0)
BOTH = pytest.mark.parametrize("config", [RELEASED, PAPER], ids=["released", "paper"])


def a_model(config: ModelConfig) -> MaskedImageModel:
    """Random values of some size in every tensor, so that no part of it is without effect."""
    model = MaskedImageModel(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(middle + torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def images(config: ModelConfig, batch: int = 3) -> tuple[Tensor, Tensor]:
    """The same uint8 pixels as patches of a shard, and normalised as (B, 3, S, S)."""
    side, size, generator = config.grid, config.patch_size, torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (batch, 3, side * size, side * size), dtype=torch.uint8, generator=generator)
    patches = pixels.view(batch, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return patches.reshape(batch, side * side, -1).contiguous(), (pixels / 255 - mean) / std


def hf_model(config: ModelConfig, weights: dict[str, Tensor]) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    BeitConfig, BeitForMaskedImageModeling = transformers.BeitConfig, transformers.BeitForMaskedImageModeling  # noqa: N806

    settings = BeitConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=int(config.width * config.mlp_ratio),
        vocab_size=config.vocabulary,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_absolute_position_embeddings=config.absolute_positions,
        use_shared_relative_position_bias=config.relative_positions,
        layer_scale_init_value=config.layer_scale,
        drop_path_rate=0.0,
    )
    model = BeitForMaskedImageModeling(settings)
    parameters = dict(model.named_parameters())
    ours = from_hf(parameters)
    back = {name: tensor for name, tensor in to_unilm(weights, config).items() if "index" not in name}
    assert ours.keys() == back.keys()
    loaded, _ = BeitForMaskedImageModeling.from_pretrained(
        None, config=settings, state_dict=to_hf(weights, config), output_loading_info=True
    )
    return loaded.train()


@BOTH
def test_logits_loss_and_every_gradient_equal_hugging_faces(config: ModelConfig) -> None:
    model = a_model(config)
    peer = hf_model(config, weights_of(model))
    patches, pixels = images(config)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, config.vocabulary, (3, config.patches), generator=generator)
    masked = torch.zeros(3, config.patches, dtype=torch.bool)
    for row in range(3):
        masked[row, torch.randperm(config.patches, generator=generator)[:6]] = True
    positions = torch.stack([row.nonzero().flatten() for row in masked])

    ours = model(patches, tokens, positions)
    loss = ours[0] / (positions >= 0).sum()
    loss.backward()
    theirs = peer(pixels, bool_masked_pos=masked, labels=tokens[masked])
    theirs.loss.backward()

    torch.testing.assert_close(
        model.predict(patches, positions).flatten(0, 1), theirs.logits[masked], rtol=1e-4, atol=2e-5
    )
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-6, atol=0)
    gradients = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    expected = from_unilm(from_hf(gradients), config)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in got.items():
        largest = expected[name].abs().max()
        assert largest > 0, name
        assert (gradient - expected[name]).abs().max() < 1e-4 * largest, name


@pytest.fixture
def timm_beit(monkeypatch: pytest.MonkeyPatch) -> Any:
    return timm_beit_class(monkeypatch)


def timm_model(kind: Any, config: ModelConfig, **changes: Any) -> Any:
    return kind(**timm_settings(config) | changes)


@BOTH
def test_timms_features_equal_ours_after_export(config: ModelConfig, timm_beit: Any) -> None:
    model = a_model(config).eval()
    peer = timm_model(timm_beit, config).eval()
    peer.load_state_dict(to_timm(weights_of(model), config), strict=True)
    patches, pixels = images(config)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(patches), peer.forward_features(pixels), rtol=1e-4, atol=2e-5)


@BOTH
def test_stochastic_depth_is_timms_for_the_same_draws(config: ModelConfig, timm_beit: Any) -> None:
    """timm draws; what it dropped is read off its modules and given to ours."""
    config = config.model_copy(update={"drop_path": 0.5})
    model = a_model(config)
    peer = timm_model(timm_beit, config, drop_path_rate=0.5).train()
    peer.load_state_dict(to_timm(weights_of(model), config), strict=True)
    patches, pixels = images(config, batch=8)
    keeps = torch.ones(8, config.depth, 2)
    for index, block in enumerate(peer.blocks):
        for branch, module in enumerate((block.drop_path1, block.drop_path2)):

            def record(_: Any, __: Any, out: Tensor, index: int = index, branch: int = branch) -> None:
                keeps[:, index, branch] = (out != 0).flatten(1).any(1).float()

            module.register_forward_hook(record)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = peer.forward_features(pixels)
        assert 0 < keeps[:, 1:].mean() < 1
        assert keeps[:, 0].all()
        torch.testing.assert_close(model.encode(patches, keeps=keeps), expected, rtol=1e-4, atol=2e-5)
    assert config.drop_path_rates == pytest.approx([0.0, 0.25, 0.5])


@BOTH
def test_names_there_and_back_lose_no_bit(config: ModelConfig) -> None:
    weights = weights_of(a_model(config))
    for name, got in (
        ("unilm", from_unilm(to_unilm(weights, config), config)),
        ("hf", from_unilm(from_hf(to_hf(weights, config)), config)),
    ):
        assert got.keys() == weights.keys(), name
        assert all(torch.equal(got[key], weights[key]) for key in weights), name
    got = from_unilm(to_timm(weights, config), config)
    assert weights.keys() - got.keys() == {"mask_token", "lm_head.weight", "lm_head.bias"}
    assert all(torch.equal(got[key], weights[key]) for key in got)


def test_what_beit_v1_does_not_have_is_refused() -> None:
    weights = weights_of(a_model(RELEASED))
    timm = to_timm(weights, RELEASED)
    timm["blocks.1.attn.relative_position_bias_table"] = timm["blocks.1.attn.relative_position_bias_table"] + 1
    with pytest.raises(WeightsError, match="tables of their own"):
        from_unilm(timm, RELEASED)
    with pytest.raises(WeightsError, match="k_bias: got key biases that are not zero"):
        from_unilm({"blocks.0.attn.k_bias": torch.ones(2)}, RELEASED)
    with pytest.raises(WeightsError, match=r"model\.patch_size: got 16"):
        from_unilm(to_unilm(weights, RELEASED), ModelConfig(**{**SMALL, "patch_size": 16}))


def test_weights_of_another_resolution_are_resampled() -> None:
    larger = ModelConfig(**{**SMALL, "image_size": 48})
    got = from_unilm(to_unilm(weights_of(a_model(RELEASED)), RELEASED), larger)
    assert got[TABLE].shape == (11 * 11 + 3, 2)
    MaskedImageModel(larger).load_state_dict(got, strict=True)
