"""The segmenter: Hugging Face's logits; the original's names, sizes and first weights; keyed dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fine_tuned_peers import a_batch, hf_config, hf_images, hf_state, randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError
from beit_dist.models.layer_decay import layer_groups
from beit_dist.models.segmenter import (
    AUXILIARY_WIDTH,
    ImageSegmenter,
    activation_bytes,
    head_channels,
    multiply_adds,
    taps,
)
from beit_dist.models.upernet import AveragePool, resized

SMALL: dict[str, Any] = {
    "width": 32,
    "depth": 6,
    "heads": 2,
    "image_size": 112,
    "patch_size": 16,
    "pixel_mean": (0.4, 0.5, 0.6),
    "pixel_std": (0.2, 0.25, 0.3),
}
PER_BLOCK = BackboneConfig(**SMALL, block_positions=True)
CLASSES = 5
HF_PYRAMID = {
    "fpn1.0.": "fpn.fpn1.conv_transpose1.",
    "fpn1.1.": "fpn.fpn1.normalization.",
    "fpn1.3.": "fpn.fpn1.conv_transpose2.",
    "fpn2.0.": "fpn.fpn2.",
}


def a_model(config: BackboneConfig = PER_BLOCK, **settings: Any) -> ImageSegmenter:
    model = ImageSegmenter(config, CLASSES, **settings)
    model.initialise(0)
    return model


def heads_as_hugging_faces(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(("decode_head.", "auxiliary_head.")):
            head, rest = name.split(".", 1)
            if rest.startswith("psp_modules."):
                _, pool, _, inner = rest.split(".", 3)
                rest = f"psp_modules.blocks.{pool}.conv.{inner}"
            rest = rest.replace(".conv.weight", ".convolution.weight").replace(".bn.", ".normalization.")
            rest = rest.replace("bottleneck.", "psp_bottleneck.") if rest.startswith("bottleneck.") else rest
            name = f"{head}.{rest.replace('conv_seg.', 'classifier.')}"
        renamed[name] = tensor
    return renamed


def test_logits_of_both_heads_equal_those_of_hugging_faces_class() -> None:
    transformers = pytest.importorskip("transformers")
    model, patches = randomise(a_model()).eval(), a_batch(PER_BLOCK)
    # Its class counts from 1, from what the first block gets: it cannot read what the last one gives. With a block
    # more, whose output it does not use, it reads the blocks that the original does.
    theirs = hf_config(PER_BLOCK, num_labels=CLASSES, out_indices=[tap + 2 for tap in model.taps], num_blocks=7)
    peer = transformers.BeitForSemanticSegmentation(theirs).eval()
    state = heads_as_hugging_faces(hf_state(model, HF_PYRAMID))
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(name.startswith("beit.layers.6.") or name.endswith("num_batches_tracked") for name in missing)
    images = hf_images(PER_BLOCK, patches)
    with torch.no_grad():
        found = model(patches)
        features = model.pyramid(patches)
        hidden = peer.beit(images, output_hidden_states=True).hidden_states
        maps = peer.fpn(tuple(as_map(hidden[tap + 1]) for tap in model.taps))
        for ours, other in zip(features, maps, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)
        expected = (peer(images).logits, peer.auxiliary_head(maps))
    for ours, other in zip(found, expected, strict=True):
        whole = resized(other, (112, 112))
        assert ours.shape == (3, CLASSES, 112, 112)
        assert (ours - whole).abs().max() < 1e-4 * whole.abs().max()


def as_map(x: Tensor) -> Tensor:
    return x[:, 1:].transpose(1, 2).reshape(len(x), -1, PER_BLOCK.grid, PER_BLOCK.grid)


def test_a_transformed_image_has_transformed_logits_where_the_weights_know_no_direction() -> None:
    # Without positions the backbone does not know where a patch is, and constant kernels know no direction.
    config = BackboneConfig(**SMALL, relative_positions=False)
    model = randomise(ImageSegmenter(config, CLASSES)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.copy_(module.weight.mean((2, 3), keepdim=True).expand_as(module.weight))
        patches = a_batch(config)
        turned = patches.view(-1, config.grid, config.grid, config.patch_bytes).transpose(1, 2).flatten(1, 2)
        for logits, others in zip(model(patches), model(turned), strict=True):
            torch.testing.assert_close(others, logits.transpose(2, 3), rtol=1e-3, atol=1e-3 * logits.abs().max())


@pytest.mark.parametrize(("depth", "expected"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (6, (1, 2, 3, 5))])
def test_the_originals_blocks_are_tapped(depth: int, expected: tuple[int, ...]) -> None:
    assert taps(depth) == expected


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_shallow_model_taps_some_blocks_twice(depth: int) -> None:
    config = BackboneConfig(**{**SMALL, "depth": depth})
    assert [tuple(x.shape[2:]) for x in a_model(config).pyramid(a_batch(config))] == [
        *((28, 28), (14, 14), (7, 7), (3, 3))
    ]


@pytest.mark.parametrize(("patch", "sides"), [(16, (32, 16, 8, 4)), (8, (32, 16, 8, 4)), (32, (16, 8, 4, 2))])
def test_maps_are_of_the_originals_sizes(patch: int, sides: tuple[int, ...]) -> None:
    config = BackboneConfig(**{**SMALL, "image_size": 128, "patch_size": patch})
    maps = a_model(config).pyramid(a_batch(config))
    assert [tuple(x.shape) for x in maps] == [(3, 32, side, side) for side in sides]


@pytest.mark.parametrize(("patch", "size"), [(16, 16), (8, 24)])
def test_a_grid_too_small_to_be_halved_is_refused(patch: int, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.image_size: got {size}, .* at least \d patches of {patch}"):
        ImageSegmenter(BackboneConfig(**{**SMALL, "image_size": size, "patch_size": patch}), CLASSES)


@pytest.mark.parametrize("side", [1, 5, 6, 12, 16])
@pytest.mark.parametrize("scale", [1, 2, 3, 6])
def test_pooling_is_pytorchs_adaptive_one(scale: int, side: int) -> None:
    x = torch.randn(2, 3, side, side + 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(AveragePool(scale)(x), F.adaptive_avg_pool2d(x, scale))


def test_dropout_takes_channels_by_the_batchs_keeps_and_scales_up_the_rest() -> None:
    model, patches = a_model(head_dropout=0.2).eval(), a_batch(PER_BLOCK)
    keeps = torch.ones(3, head_channels(PER_BLOCK), dtype=torch.uint8)
    keeps[0, :7] = 0
    keeps[1, PER_BLOCK.width :] = 0
    taken: list[Tensor] = []
    for head in (model.decode_head, model.auxiliary_head):
        head.conv_seg.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    with torch.no_grad():
        logits, auxiliary = model(patches, None, keeps)
        model(patches)
    main, second, all_main, all_second = taken
    torch.testing.assert_close(main[1:], all_main[1:] / 0.8)
    torch.testing.assert_close(main[0, 7:], all_main[0, 7:] / 0.8)
    assert (main[0, :7] == 0).all()
    torch.testing.assert_close(second[::2], all_second[::2] / 0.8)
    assert (auxiliary[1] == model.auxiliary_head.conv_seg.bias.detach().view(-1, 1, 1)).all()
    assert logits.isfinite().all()


def test_in_training_it_draws_nothing_and_every_parameter_gets_a_gradient() -> None:
    model, patches = a_model().train(), a_batch(PER_BLOCK)
    before = torch.get_rng_state()
    logits, auxiliary = model(patches)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_recomputation_changes_neither_gradients_nor_statistics() -> None:
    def step(recompute: bool) -> list[Tensor]:
        model = a_model(recompute=recompute).train()
        model(a_batch(PER_BLOCK))[0].square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return gradients + list(model.buffers())

    assert all(map(torch.equal, step(False), step(True)))


def test_first_weights_are_the_originals() -> None:
    config = BackboneConfig(width=96, depth=6, heads=3, image_size=64, block_positions=True)
    model = ImageSegmenter(config, 150)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.initialise(0)
    peers = {  # PyTorch's for the pyramid, mmsegmentation's for the heads
        "fpn1.0.weight": nn.ConvTranspose2d(96, 96, 2, 2).weight,
        "fpn1.3.bias": nn.ConvTranspose2d(96, 96, 2, 2).bias,
        "decode_head.bottleneck.conv.weight": kaiming(96, 5 * 96, 3),
        "decode_head.lateral_convs.1.conv.weight": kaiming(96, 96, 1),
        "auxiliary_head.convs.0.conv.weight": kaiming(AUXILIARY_WIDTH, 96, 3),
        "decode_head.conv_seg.weight": torch.randn(150, 96, 1, 1) * 0.01,
        "auxiliary_head.conv_seg.weight": torch.randn(150, AUXILIARY_WIDTH, 1, 1) * 0.01,
    }
    for name, peer in peers.items():
        found = model.get_parameter(name).detach()
        assert found.shape == peer.shape, name
        assert found.std() == pytest.approx(peer.std().item(), rel=0.25 if found.dim() == 1 else 0.03), name
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith(("conv_seg.bias", "bn.bias", "fpn1.1.bias")):
            assert not parameter.any(), name
        if name.endswith(("bn.weight", "fpn1.1.weight")):
            assert (parameter == 1).all(), name


def kaiming(outputs: int, inputs: int, kernel: int) -> Tensor:
    drawn = torch.empty(outputs, inputs, kernel, kernel)
    return nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu")


def test_a_model_made_on_the_meta_device_works_after_initialisation() -> None:
    with torch.device("meta"):
        made = ImageSegmenter(PER_BLOCK, CLASSES)
    made = made.to_empty(device="cpu")
    made.initialise(0)
    patches = a_batch(PER_BLOCK)
    for mode in (True, False):
        assert torch.equal(made.train(mode)(patches)[0], a_model().train(mode)(patches)[0])
        made.reset_constants()


def test_parameters_have_the_names_of_the_original() -> None:
    with torch.device("meta"):
        model = ImageSegmenter(BackboneConfig(size="base", image_size=512, block_positions=True), 150)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {
        "fpn1.0.weight": (768, 768, 2, 2),
        "fpn1.1.running_var": (768,),
        "fpn1.3.bias": (768,),
        "fpn2.0.weight": (768, 768, 2, 2),
        "decode_head.psp_modules.3.1.conv.weight": (768, 768, 1, 1),
        "decode_head.psp_modules.0.1.bn.running_mean": (768,),
        "decode_head.bottleneck.conv.weight": (768, 5 * 768, 3, 3),
        "decode_head.lateral_convs.2.conv.weight": (768, 768, 1, 1),
        "decode_head.fpn_convs.2.bn.weight": (768,),
        "decode_head.fpn_bottleneck.conv.weight": (768, 4 * 768, 3, 3),
        "decode_head.conv_seg.weight": (150, 768, 1, 1),
        "auxiliary_head.convs.0.conv.weight": (256, 768, 3, 3),
        "auxiliary_head.conv_seg.bias": (150,),
    }.items() <= shapes.items()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(163e6, rel=0.002)  # the published figure


def test_heads_and_pyramid_learn_at_the_whole_rate_and_their_convolutions_decay() -> None:
    groups = layer_groups(a_model(), 0.05, 0.65, PER_BLOCK.depth)
    last = {group["name"]: dict(group["params"]) for group in groups if group["lr_share"] == 1}
    assert set(last) == {"layer_7_decay", "layer_7_no_decay"}
    behind = {n for n, _ in a_model().named_parameters() if n.startswith(("fpn", "decode_head", "auxiliary_head"))}
    assert last["layer_7_decay"].keys() | last["layer_7_no_decay"].keys() == behind
    assert {"fpn1.1.weight", "decode_head.bottleneck.bn.weight", "fpn2.0.bias"} <= last["layer_7_no_decay"].keys()
    assert {"fpn1.0.weight", "decode_head.lateral_convs.0.conv.weight"} <= last["layer_7_decay"].keys()


def test_flops_equal_pytorchs_count_and_the_published_figure() -> None:
    model, patches = a_model().eval(), a_batch(PER_BLOCK, batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches)
    assert counter.get_total_flops() == 2 * multiply_adds(PER_BLOCK, CLASSES)


def test_recomputation_saves_what_the_blocks_keep_and_bf16_nearly_half() -> None:
    whole, half = (activation_bytes(PER_BLOCK, CLASSES, size, False) for size in (4, 2))
    assert 0.5 * whole < half < 0.75 * whole  # batch normalisation works in fp32
    tokens = 4 * PER_BLOCK.width * (1 + PER_BLOCK.patches)
    saved = whole - activation_bytes(PER_BLOCK, CLASSES, 4, True)
    assert saved == (17 * 6 - 6 - 17) * tokens
