"""The backbone: published sizes and names, the relative position table, pixels, and no randomness of its own."""

from __future__ import annotations

import pytest
import torch

from beit_dist.config.model import ModelConfig
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.positions import relative_position_index
from beit_dist.models.vit import BeitBackbone

SMALL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}


def parameters_of(**settings: object) -> dict[str, torch.nn.Parameter]:
    with torch.device("meta"):
        return dict(MaskedImageModel(ModelConfig.model_validate(settings)).named_parameters())


@pytest.mark.parametrize(
    ("size", "layer_scale", "expected"), [("base", 0.1, 91_965_776), ("large", 1e-5, 311_534_016)]
)
def test_the_published_sizes_have_the_published_number_of_parameters(
    size: str, layer_scale: float, expected: int
) -> None:
    found = parameters_of(size=size, layer_scale=layer_scale)
    assert sum(parameter.numel() for parameter in found.values()) == expected


def test_parameters_have_unilms_names_and_shapes() -> None:
    found = {name: tuple(p.shape) for name, p in parameters_of(absolute_positions=True).items()}
    width, block = 768, "blocks.11."
    expected = {
        "cls_token": (1, 1, width),
        "mask_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 768),
        "patch_embed.proj.bias": (width,),
        "rel_pos_bias.relative_position_bias_table": (732, 12),
        block + "norm1.weight": (width,),
        block + "norm1.bias": (width,),
        block + "attn.qkv.weight": (3 * width, width),
        block + "attn.q_bias": (width,),
        block + "attn.v_bias": (width,),
        block + "attn.proj.weight": (width, width),
        block + "attn.proj.bias": (width,),
        block + "gamma_1": (width,),
        block + "norm2.weight": (width,),
        block + "norm2.bias": (width,),
        block + "mlp.fc1.weight": (4 * width, width),
        block + "mlp.fc1.bias": (4 * width,),
        block + "mlp.fc2.weight": (width, 4 * width),
        block + "mlp.fc2.bias": (width,),
        block + "gamma_2": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "lm_head.weight": (8192, width),
        "lm_head.bias": (8192,),
    }
    shared = {name: shape for name, shape in found.items() if not name.startswith("blocks.")}
    last = {name: shape for name, shape in found.items() if name.startswith(block)}
    assert shared | last == expected
    assert len(found) == len(shared) + 12 * len(last)


def test_the_state_holds_parameters_only() -> None:
    model = MaskedImageModel(ModelConfig(**SMALL))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_the_papers_variant_has_positions_and_neither_layer_scale_nor_relative_bias() -> None:
    found = parameters_of(absolute_positions=True, relative_positions=False, layer_scale=0)
    assert "pos_embed" in found
    assert not [name for name in found if "gamma" in name or "rel_pos" in name]


def test_relative_positions_index_the_rows_of_unilms_table() -> None:
    index = relative_position_index(14)
    assert index.shape == (197, 197)
    assert index.max() == 731
    assert index[0, 0] == 731
    assert (index[0, 1:] == 729).all()
    assert (index[1:, 0] == 730).all()
    assert (index[1:, 1:].diagonal() == 13 * 27 + 13).all()
    query, key = 1 + 3 * 14 + 5, 1 + 7 * 14 + 4  # (3, 5) looks at (7, 4)
    assert index[query, key] == (3 - 7 + 13) * 27 + (5 - 4 + 13)
    assert len(index[1:, 1:].unique()) == 27 * 27


def test_every_row_of_the_relative_table_gets_a_gradient() -> None:
    model = BeitBackbone(ModelConfig(**SMALL))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    patches = torch.arange(16 * 192, dtype=torch.uint8).view(1, 16, 192)
    model(patches).square().sum().backward()
    assert model.rel_pos_bias is not None
    gradient = model.rel_pos_bias.relative_position_bias_table.grad
    assert gradient is not None
    assert (gradient != 0).all()


def test_pixels_are_normalised_by_channel_in_fp32_whatever_the_weights_dtype() -> None:
    config = ModelConfig(**SMALL, pixel_mean=(0.1, 0.5, 0.9), pixel_std=(0.2, 0.25, 0.5))
    model = BeitBackbone(config).bfloat16()
    seen: list[torch.Tensor] = []
    model.patch_embed.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    patches = torch.arange(16 * 192, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 16, 192)
    model(patches)
    channels = patches.double().view(1, 16, 64, 3) / 255
    expected = (channels - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
    assert seen[0].dtype is torch.bfloat16
    # One rounding to bf16, of relative size 2⁻⁸; scale or shift in bf16 would double that, and miss zero.
    torch.testing.assert_close(seen[0].double(), expected.view(1, 16, 192), rtol=2**-8 * 1.001, atol=1e-6)


def test_patch_weights_reshape_to_unilms_convolution() -> None:
    config = ModelConfig(**SMALL, pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1))
    embed = BeitBackbone(config).patch_embed
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
    patches = image.view(1, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(1, 16, 192)
    convolution = embed.proj.weight.view(32, 8, 8, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(image / 255, convolution, embed.proj.bias, stride=8)
    torch.testing.assert_close(embed(patches), expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_hidden_patches_do_not_reach_the_output() -> None:
    model = BeitBackbone(ModelConfig(**SMALL))
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, 5] = True
    black, white = torch.zeros(1, 16, 192, dtype=torch.uint8), torch.zeros(1, 16, 192, dtype=torch.uint8)
    white[0, 5] = 255
    assert torch.equal(model(black, masked), model(white, masked))
    assert not torch.equal(model(black), model(white))
