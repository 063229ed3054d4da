"""A model computes the same wherever it is loaded from, and what is no model is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from support.fine_tuned_peers import hf_config, randomise
from support.http_files import HttpFiles
from support.timm_beit import timm_beit_class, timm_settings

import beit_dist
from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.errors import CheckpointError, ConfigError, UserError, WeightsError
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.pretrained import PretrainedModel
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.weights.ecosystem import export_elsewhere
from beit_dist.weights.export import export_weights
from beit_dist.weights.stored import StoredWeights, open_weights

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8}
KINDS = ("pretraining", "classification", "segmentation")


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def normalised(count: int = 3, side: int = 32) -> torch.Tensor:
    """Images as peers take them."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def opened(run: Path) -> StoredWeights:
    return open_weights(run, kinds=KINDS)


def test_a_run_and_its_step_folder_and_its_url_are_the_same(
    pretrained: Path, photos: list[Path], runs: Path
) -> None:
    model = beit_dist.load(pretrained)
    assert isinstance(model, PretrainedModel)
    expected = model.features(photos).pooled
    (step,) = (pretrained / "checkpoints").glob("step-*")
    with HttpFiles(runs) as files:
        for source in (str(step), f"file://{pretrained}", f"{files.url}/pretrained/checkpoints/{step.name}"):
            found = beit_dist.load(source)
            assert torch.equal(found.features(photos).pooled, expected)
            assert step.name in found.provenance.name
            assert found.provenance.digest == model.provenance.digest


def test_runs_and_exports_are_loaded_from_a_store(
    pretrained: Path, classes: Path, photos: list[Path], tmp_path: Path
) -> None:
    export_elsewhere(opened(classes), tmp_path / "exported", "hf")
    store = fsspec.filesystem("memory")
    for folder in (pretrained, tmp_path / "exported"):
        store.put(str(folder), f"/loaded/{folder.name}", recursive=True)
    try:
        run = beit_dist.load("memory://loaded/pretrained")
        assert torch.equal(run.features(photos).pooled, beit_dist.load(pretrained).features(photos).pooled)
        exported, there = beit_dist.load("memory://loaded/exported"), beit_dist.load(classes)
        assert isinstance(exported, ClassificationModel)
        assert isinstance(there, ClassificationModel)
        assert exported.predict(photos) == there.predict(photos)
        store.put(str(photos[0]), "/loaded/photo.png")
        assert torch.equal(run.features("memory://loaded/photo.png").tokens, run.features(photos[0]).tokens)
    finally:
        store.rm("/loaded", recursive=True)


@pytest.mark.parametrize("form", ["safetensors", "hf", "unilm", "timm"])
def test_exports_of_a_pre_training_compute_the_same(
    pretrained: Path, photos: list[Path], tmp_path: Path, form: str
) -> None:
    model, there = beit_dist.load(pretrained), opened(pretrained)
    export_weights(there, tmp_path) if form == "safetensors" else export_elsewhere(there, tmp_path, form)
    expected = model.features(photos, [1, 2, 3])
    with HttpFiles(tmp_path) as files:
        (file,) = (path for path in tmp_path.iterdir() if path.name.startswith("model."))
        for source in (tmp_path, file, files.url if form != "unilm" else f"{files.url}/{file.name}"):
            found = beit_dist.load(source)
            assert isinstance(found, PretrainedModel)
            assert found.default_layer == 2
            for layer, features in found.features(photos, [1, 2, 3]).items():
                assert torch.equal(features.pooled, expected[layer].pooled)
            if form == "timm":
                with pytest.raises(ConfigError, match="a model with the head of its pre-training"):
                    found.reconstruct(photos)
            else:
                assert isinstance(model, PretrainedModel)
                ours, theirs = model.reconstruct(photos, 0.5, seed=3), found.reconstruct(photos, 0.5, seed=3)
                for one, other in zip(ours, theirs, strict=True):
                    assert (one.tokens == other.tokens).all()


@pytest.mark.parametrize("form", ["safetensors", "hf", "unilm", "timm"])
def test_exports_of_a_classification_predict_the_same(
    classes: Path, photos: list[Path], tmp_path: Path, form: str
) -> None:
    model, there = beit_dist.load(classes), opened(classes)
    assert isinstance(model, ClassificationModel)
    export_weights(there, tmp_path) if form == "safetensors" else export_elsewhere(there, tmp_path, form)
    found = beit_dist.load(tmp_path)
    assert isinstance(found, ClassificationModel)
    names = ("class 0", "class 1", "class 2") if form == "unilm" else model.classes
    assert found.classes == names
    assert any("does not name its classes" in note for note in found.provenance.notes) == (form == "unilm")
    images = photos
    if form == "unilm":  # says nothing of how images are measured
        images = torch.stack([torch.from_numpy(model.prepare(photo)) for photo in photos])
    assert torch.equal(found.probabilities(images), model.probabilities(images))


def test_an_export_of_a_segmentation_predicts_the_same(segments: Path, photos: list[Path], tmp_path: Path) -> None:
    export_weights(opened(segments), tmp_path / "s.safetensors")
    model, found = beit_dist.load(segments), beit_dist.load(tmp_path / "s.safetensors")
    assert isinstance(model, SegmentationModel)
    assert isinstance(found, SegmentationModel)
    assert found.classes == model.classes == ("red", "green", "blue")
    for one, other in zip(model.predict(photos), found.predict(photos), strict=True):
        assert (one.labels == other.labels).all()


@pytest.mark.parametrize("variant", ["blocks", "shared", "paper"])
def test_models_of_hugging_face_compute_what_they_do_there(tmp_path: Path, variant: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    config = {
        "blocks": BackboneConfig(**SIZES, block_positions=True),
        "shared": BackboneConfig(**SIZES),
        "paper": BackboneConfig(**SIZES, absolute_positions=True, relative_positions=False, layer_scale=0),
    }[variant]
    names = {0: "cat", 1: "dog"}
    settings = hf_config(config, id2label=names, label2id={"cat": 0, "dog": 1}, attn_implementation="eager")
    peer = randomise(transformers.BeitForImageClassification(settings)).eval()
    peer.save_pretrained(tmp_path)
    ours, images = beit_dist.load(tmp_path), normalised()
    assert isinstance(ours, ClassificationModel)
    assert ours.classes == ("cat", "dog")
    with torch.no_grad():
        theirs = peer(images, output_hidden_states=True, output_attentions=True)
    near(ours.logits(images), theirs.logits)
    for layer, features in ours.features(images, [1, 2, 3]).items():
        near(features.tokens, theirs.hidden_states[layer])
        near(ours.attention(images, layer), theirs.attentions[layer - 1])


def test_models_of_timm_compute_what_they_do_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = timm_beit_class(monkeypatch), ModelConfig(**SIZES, block_positions=True)
    peer = randomise(kind(**timm_settings(config) | {"num_classes": 2, "global_pool": "avg"})).eval()
    safetensors.torch.save_file(peer.state_dict(), tmp_path / "model.safetensors")
    look = {"mean": [0.4, 0.5, 0.6], "std": [0.5] * 3, "crop_pct": 0.5, "interpolation": "bilinear"}
    about = {"model_args": {"num_heads": 2}, "label_names": ["cat", "dog"], "pretrained_cfg": look}
    (tmp_path / "config.json").write_text(json.dumps(about))
    ours, images = beit_dist.load(tmp_path), normalised()
    assert isinstance(ours, ClassificationModel)
    assert ours.config.pixel_mean == (0.4, 0.5, 0.6)
    assert (ours.prepare.augmentation.crop_share, ours.prepare.augmentation.interpolation) == (0.5, "bilinear")
    with torch.no_grad():
        near(ours.logits(images), peer(images))
        (tokens,) = peer.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)
    near(ours.features(images, 2).tokens[:, 1:], tokens)
    assert not ours.provenance.notes


def test_what_a_file_does_not_say_is_noted(tmp_path: Path, pretrained: Path) -> None:
    there = opened(pretrained)
    safetensors.torch.save_file({name: there.read(name) for name in there.shapes}, tmp_path / "bare.safetensors")
    model = beit_dist.load(tmp_path / "bare.safetensors")
    assert "does not say how pixels were normalised: mean and deviation of 0.5" in model.provenance.notes[0]
    assert "how pixels were normalised" in repr(model)


def test_another_image_size_resamples_positions(pretrained: Path, photos: list[Path]) -> None:
    large = beit_dist.load(pretrained, image_size=64)
    found = large.features(photos)
    assert found.patch_grid.shape == (5, 32, 8, 8)
    assert large(normalised(2, 64)).shape == (2, 64)
    small = beit_dist.load(pretrained)
    cosine = torch.cosine_similarity(found.pooled, small.features(photos).pooled)
    assert cosine.min() > 0.5
    with pytest.raises(ConfigError, match=r"images: got 'a tensor \(2, 3, 64, 64\) .* image_size=64"):
        small(normalised(2, 64))
    for size in (30, 0, -8):
        with pytest.raises(ConfigError, match=f"image_size: got {size}, expected a multiple of 8"):
            beit_dist.load(pretrained, image_size=size)


def test_what_is_no_model_is_refused(tmp_path: Path, pretrained: Path, classes: Path, runs: Path) -> None:
    dvae = runs / "shards" / "tokenizer.safetensors"
    export_weights(opened(pretrained), tmp_path / "whole.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    short = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.norm2.bias"}
    safetensors.torch.save_file(short, tmp_path / "short.safetensors")
    strange = tensors | {"blocks.0.attn.q_norm.weight": torch.ones(16)}
    safetensors.torch.save_file(strange, tmp_path / "strange.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 40)
    (tmp_path / "empty").mkdir()
    attempts: list[tuple[dict[str, Any], type[UserError], str]] = [
        ({"source": tmp_path / "missing"}, WeightsError, "missing does not exist, expected a run"),
        ({"source": tmp_path / "missing.pth"}, WeightsError, "missing.pth: cannot be read"),
        ({"source": tmp_path / "empty"}, CheckpointError, "expected a run folder or step folder"),
        ({"source": dvae}, WeightsError, "got no backbone of BEiT v1"),
        ({"source": pretrained / "config.yaml"}, WeightsError, "config.yaml: is no file of weights"),
        ({"source": tmp_path / "damaged.safetensors"}, WeightsError, "a damaged safetensors file"),
        ({"source": tmp_path / "short.safetensors"}, WeightsError, "got no blocks.1.norm2.bias"),
        ({"source": tmp_path / "strange.safetensors"}, WeightsError, "got blocks.0.attn.q_norm.weight, which no"),
        ({"source": tmp_path / "whole.safetensors", "ema": True}, ConfigError, "ema: got True, expected a run"),
        ({"source": pretrained, "ema": True}, CheckpointError, "got no averaged weights"),
        ({"source": pretrained, "device": "gpu"}, ConfigError, "device: got 'gpu', expected auto, cpu"),
        (
            {"source": pretrained, "device": torch.device("cuda:99")},
            ConfigError,
            "device: got 'cuda:99', expected",
        ),
        (
            {"source": pretrained, "dtype": torch.int8},
            ConfigError,
            "dtype: got 'torch.int8', expected torch.fl",
        ),
    ]
    for arguments, error, said in attempts:
        with pytest.raises(error) as raised:
            beit_dist.load(**arguments)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
    with (
        HttpFiles(tmp_path) as files,
        pytest.raises(UserError, match="does not exist, expected a file of"),
    ):
        beit_dist.load(f"{files.url}/gone.safetensors")
