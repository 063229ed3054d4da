"""The classifier: the logits of Hugging Face's and timm's, the original's first weights, its own FLOPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fine_tuned_peers import a_batch, convolution_of, hf_config, hf_images, hf_state, randomise
from support.timm_beit import timm_beit_class, timm_settings
from torch.utils.flop_counter import FlopCounterMode

from beit_dist.config.model import BackboneConfig
from beit_dist.models.classifier import ImageClassifier, multiply_adds

SMALL: dict[str, Any] = {
    "width": 32,
    "depth": 3,
    "heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "drop_path": 0.5,
    "pixel_mean": (0.4, 0.5, 0.6),
    "pixel_std": (0.2, 0.25, 0.3),
}
PER_BLOCK = BackboneConfig(**SMALL, block_positions=True)
SHARED = BackboneConfig(**SMALL)
PAPER = BackboneConfig(**SMALL, absolute_positions=True, relative_positions=False, layer_scale=0)
ALL = pytest.mark.parametrize("config", [PER_BLOCK, SHARED, PAPER], ids=["per block", "shared", "paper"])
CLASSES = 7


def a_model(config: BackboneConfig) -> ImageClassifier:
    return randomise(ImageClassifier(config, CLASSES)).eval()


@ALL
def test_logits_equal_those_of_hugging_faces_class(config: BackboneConfig) -> None:
    transformers = pytest.importorskip("transformers")
    model, patches = a_model(config), a_batch(config)
    peer = transformers.BeitForImageClassification(hf_config(config, num_labels=CLASSES)).eval()
    state = hf_state(model, {"fc_norm.": "beit.pooler.layernorm.", "head.": "classifier."})
    peer.load_state_dict(state)
    with torch.no_grad():
        expected = peer(hf_images(config, patches)).logits
        torch.testing.assert_close(model(patches), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5  # nothing vanished


@ALL
def test_logits_equal_those_of_timms_class(config: BackboneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = config.relative_positions and not config.block_positions
    settings = timm_settings(config, shared_bias=shared)
    settings |= {"num_classes": CLASSES, "global_pool": "avg"}
    peer = timm_beit_class(monkeypatch)(**settings).eval()
    model, patches = a_model(config), a_batch(config)
    weights = convolution_of(model)
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model(patches), peer(hf_images(config, patches)), rtol=1e-4, atol=1e-4)


def test_pixels_may_come_as_floats_on_the_same_scale() -> None:
    model, patches = a_model(PER_BLOCK), a_batch(PER_BLOCK)
    assert torch.equal(model(patches.float()), model(patches))


def test_a_dropped_branch_leaves_its_input_as_it_was() -> None:
    model, patches = a_model(PER_BLOCK), a_batch(PER_BLOCK)
    keeps = torch.ones(len(patches), PER_BLOCK.depth, 2, dtype=torch.uint8)
    keeps[:, 1:] = 0
    with torch.no_grad():
        first = next(model.layers(patches))
        expected = model.head(model.fc_norm(first[:, 1:].mean(1)))
        assert torch.equal(model(patches, keeps), expected)


def test_it_has_neither_mask_token_nor_final_norm_and_unilms_names() -> None:
    names = {name for name, _ in ImageClassifier(PER_BLOCK, CLASSES).named_parameters()}
    behind = {name for name in names if not name.startswith("blocks.")}
    assert behind == {
        "cls_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"),
    }


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = ImageClassifier(BackboneConfig(size="base", block_positions=True), 1000)
    # timm's beit_base_patch16_224: 86.53 million.
    assert sum(p.numel() for p in model.parameters()) == 86_530_984


def test_first_weights_are_the_originals() -> None:
    config = BackboneConfig(width=192, depth=2, heads=3, image_size=64, absolute_positions=True)
    model = ImageClassifier(config, 512)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    model.initialise(0)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.startswith("patch_embed"):  # a convolution of PyTorch: uniform within 1 / sqrt(fan in)
            edge = 1 / math.sqrt(config.patch_bytes)
            assert 0.95 * edge < value.abs().max() <= edge
            assert value.std() == pytest.approx(edge / math.sqrt(3), rel=0.1)
        elif value.dim() > 1 and "relative" not in name:  # not truncated: there are values beyond two deviations
            last = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            shrink = math.sqrt(2 * (int(name.split(".")[1]) + 1)) if last else 1
            shrink *= 1000 if name == "head.weight" else 1
            assert value.std() * shrink == pytest.approx(0.02, rel=0.2 if value.numel() < 5000 else 0.02), name
            assert value.abs().max() * shrink > (0.04 if value.numel() < 5000 else 0.06), name
        else:
            is_one = name.endswith(".weight") and "norm" in name
            assert (value == (1.0 if is_one else 0.1 if "gamma" in name else 0.0)).all(), name


def test_the_first_loss_is_that_of_guessing_and_the_seed_determines_it() -> None:
    def first_logits(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # the global generator plays no part
        model = ImageClassifier(PER_BLOCK, CLASSES)
        model.initialise(seed)
        return model(a_batch(PER_BLOCK)).detach()

    first, again, other = first_logits(5), first_logits(5), first_logits(6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    loss = F.cross_entropy(first, torch.arange(len(first)))
    assert loss == pytest.approx(math.log(CLASSES), rel=1e-3)


def test_a_model_made_on_the_meta_device_works_after_initialisation() -> None:
    with torch.device("meta"):
        made = ImageClassifier(PER_BLOCK, CLASSES)
    made = made.to_empty(device="cpu")
    usual = ImageClassifier(PER_BLOCK, CLASSES)
    made.initialise(3)
    usual.initialise(3)
    patches = a_batch(PER_BLOCK)
    assert torch.equal(made(patches), usual(patches))


def test_flops_equal_pytorchs_count() -> None:
    model = ImageClassifier(PER_BLOCK, CLASSES)
    patches = a_batch(PER_BLOCK)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches)
    assert counter.get_total_flops() == 2 * len(patches) * multiply_adds(PER_BLOCK, CLASSES)
