"""Fine-tuned models that Hugging Face, timm and the original's scripts wrote compute the same here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.fine_tuned_peers import a_batch, convolution_of, hf_config, hf_images, randomise
from support.timm_beit import timm_beit_class, timm_settings
from torch import Tensor, nn

from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.engine.initialisation import check_foreign
from beit_dist.models.buffers import kept_buffers
from beit_dist.models.classifier import ImageClassifier
from beit_dist.models.segmenter import ImageSegmenter
from beit_dist.weights.foreign import Foreign
from beit_dist.weights.origin import backbone_of, finetuned_from_file

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8}
BLOCKS = BackboneConfig(**SIZES, block_positions=True)
SHARED = BackboneConfig(**SIZES)
PAPER = BackboneConfig(**SIZES, absolute_positions=True, relative_positions=False, layer_scale=0)
ALL = pytest.mark.parametrize("config", [BLOCKS, SHARED, PAPER], ids=["blocks", "shared", "paper"])
CLASSES = ("cat", "dog", "owl", "zebra")


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers needs Python 3.11")


def start(model: nn.Module, source: Path, config: BackboneConfig) -> Foreign:
    """The model with the weights that a run would start from, and what there was to say of them."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **kept_buffers(model)}
    found = finetuned_from_file(str(source), config, tensors.keys(), CLASSES)
    check_foreign(str(source), {name: list(tensor.shape) for name, tensor in tensors.items()}, found)
    with torch.no_grad():
        for name, tensor in found.weights.items():
            tensors[name].copy_(tensor)
    model.eval()
    return found


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@ALL
def test_hugging_faces_classifiers_have_equal_logits_here(
    tmp_path: Path, config: BackboneConfig, transformers: Any
) -> None:
    names = dict(enumerate(CLASSES))
    settings = hf_config(config, id2label=names, label2id={name: number for number, name in names.items()})
    peer = randomise(transformers.BeitForImageClassification(settings)).eval()
    peer.save_pretrained(tmp_path)
    found = backbone_of(str(tmp_path))
    assert BackboneConfig(**found).model_copy(update={"layer_scale": config.layer_scale}) == config
    ours = ImageClassifier(config, len(CLASSES))
    assert not start(ours, tmp_path, config).left_out
    patches = a_batch(config)
    with torch.no_grad():
        assert_near(ours(patches), peer(hf_images(config, patches)).logits)


@ALL
def test_timms_classifiers_have_equal_logits_here(
    tmp_path: Path, config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = timm_beit_class(monkeypatch)
    settings = timm_settings(ModelConfig(**config.model_dump()), shared_bias=not config.block_positions)
    peer = randomise(kind(**settings | {"num_classes": len(CLASSES), "global_pool": "avg"})).eval()
    safetensors.torch.save_file(peer.state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": "beit_base_patch16_224", "model_args": {"num_heads": config.heads}}
    (tmp_path / "config.json").write_text(json.dumps({**about, "label_names": list(CLASSES)}))
    assert backbone_of(str(tmp_path))["heads"] == config.heads
    ours = ImageClassifier(config, len(CLASSES))
    assert not start(ours, tmp_path, config).left_out
    patches = a_batch(config)
    with torch.no_grad():
        assert_near(ours(patches), peer(hf_images(config, patches)))


@pytest.mark.parametrize("wrapper", ["model", "module"])  # of its scripts, and of DeepSpeed there
def test_the_originals_fine_tuned_files_are_read_with_their_head(tmp_path: Path, wrapper: str) -> None:
    model = randomise(ImageClassifier(BLOCKS, len(CLASSES))).eval()
    index = {f"blocks.{block}.attn.relative_position_index": torch.zeros(17, 17).long() for block in range(3)}
    torch.save({wrapper: convolution_of(model) | index, "epoch": 3}, tmp_path / "checkpoint-best.pth")
    ours = ImageClassifier(BLOCKS, len(CLASSES))
    found = start(ours, tmp_path / "checkpoint-best.pth", BLOCKS)
    assert "nothing names its 4 classes" in found.notes[0]
    patches = a_batch(BLOCKS)
    with torch.no_grad():
        assert torch.equal(ours(patches), model(patches))


def test_a_classifier_of_a_class_token_lends_its_backbone(tmp_path: Path, transformers: Any) -> None:
    settings = hf_config(BLOCKS, num_labels=len(CLASSES))
    settings.use_mean_pooling = False
    peer = randomise(transformers.BeitForImageClassification(settings))
    peer.save_pretrained(tmp_path)
    found = start(ImageClassifier(BLOCKS, len(CLASSES)), tmp_path, BLOCKS)
    assert found.left_out == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert "its head is on the class token" in found.notes[0]


def test_hugging_faces_segmentations_are_read_with_heads_and_statistics(tmp_path: Path, transformers: Any) -> None:
    config = BackboneConfig(**SIZES | {"image_size": 64, "patch_size": 16}, block_positions=True)
    names = dict(enumerate(CLASSES))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    settings = hf_config(config, **labels, out_indices=[0, 1, 2, 3])
    peer = randomise(transformers.BeitForSemanticSegmentation(settings)).eval()
    peer.save_pretrained(tmp_path)
    ours = ImageSegmenter(config, len(CLASSES))
    found = start(ours, tmp_path, config)
    assert not found.left_out
    assert found.weights.keys() == {*dict(ours.named_parameters()), *kept_buffers(ours)}
    maps = [torch.randn(2, 32, side, side, generator=torch.Generator().manual_seed(6)) for side in (16, 8, 4, 2)]
    tapped = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert_near(ours.decode_head(maps), peer.decode_head(maps))
        assert_near(ours.auxiliary_head(maps[2]), peer.auxiliary_head(maps))
        for ours_level, level in zip((ours.fpn1, ours.fpn2), (peer.fpn.fpn1, peer.fpn.fpn2), strict=True):
            assert_near(ours_level(tapped), level(tapped))


def test_mmsegmentations_files_are_read_with_heads_and_statistics(tmp_path: Path) -> None:
    config = BackboneConfig(**SIZES | {"image_size": 64, "patch_size": 16}, block_positions=True)
    model = randomise(ImageSegmenter(config, len(CLASSES))).eval()
    state = {
        name if name.startswith(("decode_head.", "auxiliary_head.")) else f"backbone.{name}": tensor
        for name, tensor in convolution_of(model).items()
    }
    state["decode_head.bottleneck.bn.num_batches_tracked"] = torch.tensor(5)
    torch.save({"meta": {"CLASSES": CLASSES, "iter": 3}, "state_dict": state}, tmp_path / "iter_3.pth")
    ours = ImageSegmenter(config, len(CLASSES))
    found = start(ours, tmp_path / "iter_3.pth", config)
    assert (found.classes, found.left_out) == (CLASSES, [])
    patches = a_batch(config)
    with torch.no_grad():
        for got, expected in zip(ours(patches), model(patches), strict=True):
            assert torch.equal(got, expected)
