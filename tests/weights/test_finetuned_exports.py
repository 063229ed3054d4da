"""Fine-tuned models leave for Hugging Face and timm with equal logits and their classes, and come back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from support.torchvision_stub import stand_in_for_torchvision
from support.weights_of_runs import a_run, stored
from torch import Tensor

from beit_dist.config.model import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from beit_dist.errors import ConfigError
from beit_dist.models.classifier import ImageClassifier
from beit_dist.weights.ecosystem import export_elsewhere
from beit_dist.weights.export import export_weights
from beit_dist.weights.forms import FORMS
from beit_dist.weights.origin import backbone_of, finetuned_from_file
from beit_dist.weights.stored import StoredWeights

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "mlp_ratio": 3.0}
PIXELS: dict[str, Any] = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}
BLOCKS = BackboneConfig(**SIZES, **PIXELS, block_positions=True)
SHARED = BackboneConfig(**SIZES, **PIXELS)
PAPER = BackboneConfig(**SIZES, **PIXELS, absolute_positions=True, relative_positions=False, layer_scale=0)
ALL = pytest.mark.parametrize("config", [BLOCKS, SHARED, PAPER], ids=["blocks", "shared", "paper"])
CLASSES = ("a cat", "dog", "owl", "Žebra")


def a_classifier(folder: Path, config: BackboneConfig) -> tuple[StoredWeights, ImageClassifier]:
    """A run of random values, and the model of them."""
    model = ImageClassifier(config, len(CLASSES)).eval()
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    run, weights = a_run(folder, "classification", shapes, config, classes=CLASSES)
    model.load_state_dict(weights)
    return stored(run), model


def images(config: BackboneConfig) -> tuple[Tensor, Tensor]:
    """Random patches, and the same pixels normalised as (2, 3, S, S)."""
    side, size = config.grid, config.patch_size
    pixels = torch.randint(0, 256, (2, 3, side * size, side * size), generator=torch.Generator().manual_seed(4))
    patches = pixels.view(2, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1).reshape(2, side * side, -1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return patches.to(torch.uint8), (pixels / 255 - mean) / std


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@ALL
def test_hugging_faces_classifier_has_equal_logits_and_the_names_of_the_classes(
    tmp_path: Path, config: BackboneConfig
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    there, ours = a_classifier(tmp_path / "run", config)
    exported = export_elsewhere(there, tmp_path / "out", "hf")
    assert exported.reader == "BeitForImageClassification of Hugging Face, 4 classes"
    peer, notes = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(peer).__name__ == "BeitForImageClassification"
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tuple(peer.config.id2label[number] for number in range(4)) == CLASSES
    assert peer.config.label2id == {name: number for number, name in enumerate(CLASSES)}
    patches, pixels = images(config)
    with torch.no_grad():
        assert_near(peer.eval()(pixels).logits, ours(patches))
    peer.save_pretrained(tmp_path / "theirs")
    assert_comes_back(tmp_path / "theirs", config, ours)


def test_hugging_faces_processor_crops_as_the_run_measures(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    there, _ = a_classifier(tmp_path / "run", BLOCKS)
    export_elsewhere(there, tmp_path / "out", "hf")
    wide = Image.effect_noise((90, 45), 80).convert("RGB")
    resized = wide.resize((72, 36), Image.Resampling.BICUBIC)  # shorter side 36 = int(32 / (224 / 256))
    crop = torch.tensor(list(resized.crop((20, 2, 52, 34)).tobytes())).view(32, 32, 3).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    made = torch.as_tensor(processor(wide)["pixel_values"][0])
    torch.testing.assert_close(made.float(), (crop / 255 - mean) / std, rtol=0, atol=1e-5)


@ALL
def test_timm_makes_the_classifier_of_the_folder_by_itself(
    tmp_path: Path, config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install --no-deps timm")
    stand_in_for_torchvision(monkeypatch)
    import timm

    there, ours = a_classifier(tmp_path / "run", config)
    assert export_elsewhere(there, tmp_path / "out", "timm").reader == "Beit of timm, 4 classes"
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert tuple(peer.pretrained_cfg["label_names"]) == CLASSES
    assert (peer.pretrained_cfg["crop_pct"], peer.global_pool) == (224 / 256, "avg")
    patches, pixels = images(config)
    with torch.no_grad():
        assert_near(peer(pixels), ours(patches))


def assert_comes_back(source: Path, config: BackboneConfig, ours: ImageClassifier) -> None:
    """A new run of the same classes starts from these weights, bit for bit."""
    found = finetuned_from_file(str(source), config, ours.state_dict().keys(), CLASSES)
    assert found.classes == CLASSES
    assert not found.left_out
    assert found.weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in ours.state_dict().items())


@ALL
@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_what_is_exported_comes_back_with_its_classes(tmp_path: Path, config: BackboneConfig, form: str) -> None:
    there, ours = a_classifier(tmp_path / "run", config)
    out = tmp_path / "out"
    if form == "safetensors":
        export_weights(there, out)
    else:
        export_elsewhere(there, out, form)
    found = backbone_of(str(out))
    same = BackboneConfig(**found)
    shared = config.relative_positions and not config.block_positions
    if shared and form == "timm":  # which has a table in each block
        assert same.block_positions
        same = same.model_copy(update={"block_positions": False})
    assert same.model_copy(update={"layer_scale": config.layer_scale}) == config
    if form == "unilm":  # its files have no place for names
        notes = finetuned_from_file(str(out), config, ours.state_dict().keys(), CLASSES).notes
        assert notes == ["nothing names its 4 classes; they are taken for those of this data, in their order"]
    else:
        assert_comes_back(out, config, ours)


def test_the_originals_file_of_a_classifier_has_its_layout(tmp_path: Path) -> None:
    there, ours = a_classifier(tmp_path / "run", BLOCKS)
    export_elsewhere(there, tmp_path, "unilm")
    loaded = torch.load(tmp_path / "model.pth")
    indices = {f"blocks.{block}.attn.relative_position_index" for block in range(3)}
    assert loaded["model"].keys() == {*ours.state_dict(), *indices}
    assert loaded["args"]["nb_classes"] == 4


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("hf", "cannot see the output of the last block"),
        ("timm", "no models for segmentation"),
        ("unilm", "mmsegmentation"),
    ],
)
def test_a_segmentation_is_refused_by_the_forms_that_cannot_hold_it(tmp_path: Path, form: str, said: str) -> None:
    run, _ = a_run(tmp_path / "run", "segmentation", {"cls_token": [1, 1, 32]}, BLOCKS, classes=CLASSES)
    with pytest.raises(ConfigError, match=rf"--to: got '{form}'.*{said}.*safetensors holds any model"):
        export_elsewhere(stored(run), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_hugging_faces_class_for_segmentation_still_cannot_see_the_last_block() -> None:
    """Should it learn to, a segmentation can be exported to it."""
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    settings: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="out_indices must be valid"):
        transformers.BeitConfig(**settings, out_indices=[5, 7, 9, 13])
    model = transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(
            **settings, image_size=32, patch_size=8, intermediate_size=32, out_indices=[3, 5, 7, 12]
        )
    ).eval()
    seen: list[Any] = []
    model.beit.layers[11].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.fpn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][-1]))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    last, tapped = seen
    assert not torch.allclose(tapped.flatten(2).transpose(1, 2), last[:, 1:])


def test_the_statistics_of_batch_normalisation_are_exported_too(tmp_path: Path) -> None:
    shapes, buffers = {"cls_token": [1, 1, 32], "fpn1.1.weight": [32]}, {"fpn1.1.running_var": [32]}
    run, weights = a_run(tmp_path / "run", "segmentation", shapes, BLOCKS, classes=CLASSES, buffers=buffers)
    exported = export_weights(stored(run), tmp_path / "out")
    assert exported.tensors == 3
    found = safetensors.torch.load_file(exported.path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    with safetensors.safe_open(exported.path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        assert file.metadata()["kind"] == "segmentation"
