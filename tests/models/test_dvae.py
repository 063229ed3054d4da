"""The dVAE is the published architecture, and its tokens are well defined."""

import pytest
import torch
import torch.nn.functional as F

from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import TokenizerError
from beit_dist.models.dvae import DVAE, Block, Conv, Decoder, Encoder, map_pixels, unmap_pixels

TINY = DVAEConfig(vocabulary=24, hidden=8, blocks_per_group=1, decoder_input=6)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def some_images(count: int = 2, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_default_sizes_are_the_published_ones():
    with torch.device("meta"):
        encoder, decoder = Encoder(DVAEConfig()), Decoder(DVAEConfig())
    assert parameters(encoder) == 53_786_240
    assert parameters(decoder) == 43_829_766


def test_parameters_carry_openai_names_and_shapes():
    with torch.device("meta"):
        encoder, decoder = Encoder(DVAEConfig()).state_dict(), Decoder(DVAEConfig()).state_dict()
    assert tuple(encoder["blocks.input.w"].shape) == (256, 3, 7, 7)
    assert tuple(encoder["blocks.group_1.block_1.res_path.conv_1.w"].shape) == (64, 256, 3, 3)
    assert tuple(encoder["blocks.group_2.block_1.id_path.w"].shape) == (512, 256, 1, 1)
    assert tuple(encoder["blocks.group_4.block_2.res_path.conv_4.w"].shape) == (2048, 512, 1, 1)
    assert tuple(encoder["blocks.output.conv.w"].shape) == (8192, 2048, 1, 1)
    assert "blocks.group_1.block_1.id_path.w" not in encoder
    assert tuple(decoder["blocks.input.w"].shape) == (128, 8192, 1, 1)
    assert tuple(decoder["blocks.group_1.block_1.id_path.b"].shape) == (2048,)
    assert tuple(decoder["blocks.group_1.block_1.res_path.conv_1.w"].shape) == (512, 128, 1, 1)
    assert tuple(decoder["blocks.group_4.block_2.res_path.conv_4.w"].shape) == (256, 64, 3, 3)
    assert tuple(decoder["blocks.output.conv.w"].shape) == (6, 256, 1, 1)


def test_residual_gain_is_one_over_layers_squared():
    with torch.device("meta"):
        gains = {m.gain for m in DVAE(DVAEConfig()).modules() if isinstance(m, Block)}
    assert gains == {1 / 64}
    assert {m.gain for m in DVAE(TINY).modules() if isinstance(m, Block)} == {1 / 16}


def test_a_block_adds_its_scaled_residual_path_to_its_input():
    block = Block(8, 8, (3, 3, 3, 1), 0.25)
    for module in block.modules():
        if isinstance(module, Conv):
            module.initialise(torch.Generator().manual_seed(1))
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(2))
    h = x
    for name in ("conv_1", "conv_2", "conv_3", "conv_4"):
        conv = block.res_path.get_submodule(name)
        h = F.conv2d(F.relu(h), conv.w, conv.b, padding=conv.w.shape[-1] // 2)
    torch.testing.assert_close(block(x), x + 0.25 * h)


def test_weights_start_with_variance_one_over_fan_in():
    model = DVAE(DVAEConfig(vocabulary=512, hidden=32, blocks_per_group=1, decoder_input=64))
    for module in model.modules():
        if isinstance(module, Conv) and module.w.numel() > 4000:
            assert module.w.std().item() == pytest.approx(module.w[0].numel() ** -0.5, rel=0.05)
            assert not module.b.any()


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(1)
    first = DVAE(TINY, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = DVAE(TINY, seed=5).state_dict(), DVAE(TINY, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.blocks.input.w"], other["encoder.blocks.input.w"])


def test_encoder_gives_one_position_for_each_8_by_8_pixels():
    model = DVAE(TINY)
    assert model.encoder(torch.rand(2, 3, 16, 40)).shape == (2, 24, 2, 5)
    assert model.decoder(torch.rand(2, 24, 2, 5)).shape == (2, 6, 16, 40)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 12, 16)])
def test_encoder_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        DVAE(TINY).encoder(torch.rand(shape))


def test_tokens_are_the_argmax_on_mapped_pixels():
    model, images = DVAE(TINY), some_images()
    with torch.no_grad():
        expected = model.encoder(0.8 * (images.float() / 255) + 0.1).argmax(1)
    got = model.tokens(images)
    assert got.dtype == torch.int64
    assert got.shape == (2, 3, 3)
    assert torch.equal(got, expected)
    assert torch.equal(got, model.tokens(images))


def test_tokens_refuse_float_images():
    with pytest.raises(ValueError, match="uint8"):
        DVAE(TINY).tokens(torch.rand(1, 3, 8, 8))


def test_one_hot_tokens_decode_like_their_look_up():
    model = DVAE(TINY)
    tokens = torch.randint(0, 24, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    one_hot = F.one_hot(tokens, 24).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(model.decoder.from_tokens(tokens), model.decoder(one_hot))
    expected = unmap_pixels(torch.sigmoid(model.decoder(one_hot)[:, :3]))
    torch.testing.assert_close(model.decode(tokens), expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_over_99_in_100_tokens_are_the_same_in_low_precision(precision):
    model, images = DVAE(DVAEConfig(vocabulary=512, hidden=16, decoder_input=4)), some_images(8, 64)
    tokens = model.tokens(images)
    assert (tokens == model.tokens(images, precision)).float().mean() > 0.99
    with torch.autocast("cpu", torch.bfloat16):  # one around the call changes nothing
        assert torch.equal(tokens, model.tokens(images))


@pytest.mark.parametrize(("precision", "low"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_low_precision_is_that_of_the_residual_paths_alone(precision, low):
    model, types = DVAE(TINY), {}
    for name, module in model.encoder.named_modules():
        if isinstance(module, Conv):
            module.register_forward_hook(lambda _m, _i, out, name=name: types.update({name: out.dtype}))
    model.tokens(some_images(), precision)
    assert {"blocks.input", "blocks.group_2.block_1.id_path", "blocks.output.conv"} < types.keys()
    assert all((kind is low) == ("res_path" in name) for name, kind in types.items())


def test_logits_that_are_not_finite_make_no_tokens():
    model = DVAE(TINY)
    with torch.no_grad():
        model.encoder.blocks.group_1.block_1.res_path.conv_4.b.fill_(1e38)
    with pytest.raises(TokenizerError, match=r"not finite in fp16.*--precision fp32"):
        model.tokens(some_images(), "fp16")


def test_pixels_are_mapped_to_the_range_of_the_dvae_and_back():
    pixels = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(map_pixels(pixels), torch.tensor([0.1, 0.3, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(pixels)), pixels)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
