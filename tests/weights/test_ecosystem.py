"""A run's weights leave for Hugging Face, timm and unilm and come back without a bit lost."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from support.torchvision_stub import stand_in_for_torchvision

from beit_dist.checkpoints.layout import committed
from beit_dist.config.model import HALF, IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.initialisation import check_foreign
from beit_dist.errors import ConfigError, WeightsError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.storage.local import LocalPlace
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.weights.ecosystem import export_elsewhere
from beit_dist.weights.export import metadata_of
from beit_dist.weights.foreign import is_foreign, read_foreign
from beit_dist.weights.forms import FORMS
from beit_dist.weights.stored import load_weights, open_weights

SMALL: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vocabulary": 64,
    "pixel_mean": IMAGENET_MEAN,
    "pixel_std": IMAGENET_STD,
}
RELEASED = ModelConfig(**SMALL)
PAPER = ModelConfig(**SMALL, absolute_positions=True, relative_positions=False, layer_scale=0)
BOTH = pytest.mark.parametrize("model", [RELEASED, PAPER], ids=["released", "paper"])


def recipe(source: str | Path, **model: Any) -> PretrainingConfig:
    return PretrainingConfig(run="r", init_from=str(source), model=model, masking={"min_block": 4})


def a_run(model: ModelConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    """What export reads of a checkpoint, with random values in every tensor."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.2
        for name, p in MaskedImageModel(model).named_parameters()
    }
    manifest = {"step": 5, "position": {"samples": 80}, "dataset": "d", "tokenizer": "t"}
    stored = SimpleNamespace(
        kind="pretraining",
        classes=None,
        config=SimpleNamespace(model=model),
        model=model,
        role="weight",
        shapes={name: list(tensor.shape) for name, tensor in weights.items()},
        read=lambda name: weights[name].clone(),
        saved=SimpleNamespace(manifest=manifest, folder=Path("step-5")),
    )
    return stored, weights


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_what_is_exported_comes_back_bit_for_bit_with_its_normalisation(
    tmp_path: Path, model: ModelConfig, form: str
) -> None:
    stored, weights = a_run(model)
    exported = export_elsewhere(stored, tmp_path / "out", form)
    source = tmp_path / "out"
    assert is_foreign(str(source))
    found = read_foreign(source, model)
    assert is_foreign(str(exported.path))
    alone = read_foreign(exported.path, model)  # without the files beside it
    assert {name: found.known[name] for name in alone.known} == alone.known
    assert {"pixel_mean", "pixel_std"} <= alone.known.keys()
    lost = {"mask_token", "lm_head.weight", "lm_head.bias"} if form == "timm" else set()
    assert weights.keys() - found.weights.keys() == lost
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.weights.items())
    assert found.known["pixel_mean"] == IMAGENET_MEAN
    assert found.known["pixel_std"] == IMAGENET_STD
    check_origin(recipe(source, **model.model_dump()), stored.shapes)
    other = recipe(source, **{**model.model_dump(), "pixel_mean": HALF})
    with pytest.raises(ConfigError, match=r"model\.pixel_mean: got \(0\.5, 0\.5, 0\.5\), expected \(0\.485"):
        check_origin(other, stored.shapes)


def check_origin(config: PretrainingConfig, shapes: dict[str, list[int]]) -> None:
    """What a new run looks at in the weights that it is to start from."""
    source = str(config.init_from)
    check_foreign(source, shapes, Pretraining(config).foreign(source))


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_a_form_has_no_place_for_is_refused_or_left_out(tmp_path: Path, form: str) -> None:
    model = RELEASED.model_copy(update={"target": "pixels"})
    stored, weights = a_run(model)
    if form != "timm":
        with pytest.raises(ConfigError, match=rf"--to: got '{form}'.*model\.target=pixels.*safetensors .*; timm "):
            export_elsewhere(stored, tmp_path / "out", form)
        assert not (tmp_path / "out").exists()
        return
    export_elsewhere(stored, tmp_path / "out", form)
    found = read_foreign(tmp_path / "out", model)
    assert weights.keys() - found.weights.keys() == {"mask_token", "pixel_head.weight", "pixel_head.bias"}
    check_origin(recipe(tmp_path / "out", **model.model_dump()), stored.shapes)


def test_the_head_of_another_target_is_left_out_and_said(tmp_path: Path) -> None:
    pixels = RELEASED.model_copy(update={"target": "pixels"})
    export_elsewhere(a_run(RELEASED)[0], tmp_path, "hf")
    found = read_foreign(tmp_path, pixels)
    assert sorted(found.left_out) == ["lm_head.bias", "lm_head.weight"]
    check_origin(recipe(tmp_path, **pixels.model_dump()), a_run(pixels)[0].shapes)


def test_a_file_under_our_own_names_is_read_too(tmp_path: Path) -> None:
    stored, weights = a_run(RELEASED)
    metadata = metadata_of(stored, "fp32")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata)
    assert is_foreign(str(tmp_path))
    found = read_foreign(tmp_path, RELEASED)
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    assert found.known == {"heads": 2, "pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


@BOTH
def test_timm_makes_the_model_of_the_folder_by_itself(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install --no-deps timm")
    stand_in_for_torchvision(monkeypatch)
    import timm

    stored, weights = a_run(model)
    export_elsewhere(stored, tmp_path, "timm")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert peer.pretrained_cfg["mean"] == list(IMAGENET_MEAN)
    ours = MaskedImageModel(model)
    ours.load_state_dict(weights)
    patches, pixels = images(model)
    with torch.no_grad():
        expected = ours.encode(patches)
        near = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(peer.forward_features(pixels), expected, rtol=1e-4, atol=near)
        torch.testing.assert_close(peer(pixels), expected[:, 0], rtol=1e-4, atol=near)


def images(model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches of a shard, and the same pixels normalised as (2, 3, S, S)."""
    side, size = model.grid, model.patch_size
    pixels = torch.randint(0, 256, (2, 3, side * size, side * size), generator=torch.Generator().manual_seed(4))
    patches = pixels.view(2, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1).reshape(2, side * side, -1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.pixel_mean, model.pixel_std))
    return patches.to(torch.uint8), (pixels / 255 - mean) / std


def test_the_image_processor_makes_what_the_model_was_trained_on(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    export_elsewhere(a_run(RELEASED)[0], tmp_path, "hf")
    _, pixels = images(RELEASED)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    picture = ((pixels[0] * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    made = torch.as_tensor(processor(Image.fromarray(picture))["pixel_values"][0])
    torch.testing.assert_close(made.double(), pixels[0].double(), rtol=0, atol=1e-5)
    assert processor(Image.new("RGB", (50, 40)))["pixel_values"][0].shape == (3, 32, 32)


@BOTH
def test_hugging_face_loads_the_folder_whole_and_saves_what_we_read(tmp_path: Path, model: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    stored, weights = a_run(model)
    export_elsewhere(stored, tmp_path / "out", "hf")
    peer, notes = transformers.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.config.layer_norm_eps == 1e-6
    assert peer.config.use_mean_pooling
    look = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (tuple(look["image_mean"]), tuple(look["image_std"])) == (IMAGENET_MEAN, IMAGENET_STD)
    peer.save_pretrained(tmp_path / "theirs")
    back = read_foreign(tmp_path / "theirs", model)
    assert back.known == {"heads": 2}
    assert all(torch.equal(back.weights[name], weights[name]) for name in weights)


def test_the_originals_file_has_its_layout(tmp_path: Path) -> None:
    stored, weights = a_run(RELEASED)
    exported = export_elsewhere(stored, tmp_path, "unilm")
    loaded = torch.load(exported.path)  # as the original does: with torch's defaults, today's or those of its time
    assert loaded["args"]["imagenet_default_mean_and_std"] is True
    assert loaded["model"]["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    assert loaded["model"]["rel_pos_bias.relative_position_index"].shape == (17, 17)
    assert loaded["model"].keys() == {*weights, "rel_pos_bias.relative_position_index"}
    loaded["args"] = argparse.Namespace(imagenet_default_mean_and_std=False)  # as in the original's own files
    torch.save(loaded, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_foreign(tmp_path / "old.pth", RELEASED).known == {"pixel_mean": HALF, "pixel_std": HALF}


def test_a_run_in_a_folder_named_like_a_file_of_weights_is_a_run(tmp_path: Path) -> None:
    run = tmp_path / "sweep.bin"
    (run / "checkpoints").mkdir(parents=True)
    assert not is_foreign(str(run))
    (tmp_path / "weights.bin").touch()
    assert is_foreign(str(tmp_path / "weights.bin"))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: got something else, expected a state dict"):
        read_foreign(tmp_path / "a.pth", RELEASED)
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="a damaged safetensors file"):
        read_foreign(tmp_path / "b.safetensors", RELEASED)
    torch.save({"model": {"fc.weight": torch.ones(2)}}, tmp_path / "c.pth")
    config = recipe(tmp_path / "c.pth", **RELEASED.model_dump())
    with pytest.raises(WeightsError, match=r"s3://bucket/c\.pth: got a URL, expected a local file"):
        read_foreign("s3://bucket/c.pth", RELEASED)
    with pytest.raises(ConfigError, match=r"cls_token is missing.*more"):
        check_origin(config, a_run(RELEASED)[0].shapes)


@pytest.mark.slow
def test_a_run_goes_out_and_a_new_one_starts_from_it_exactly(new_run: Callable[..., Any], tmp_path: Path) -> None:
    """The first update of a warm-up has learning rate 0: after it the weights are still those it began with."""
    old = new_run("old", overrides=["loader.workers=0", "steps=6"])
    assert old.finish()[0] == 0
    export_elsewhere(open_weights(old.folder), tmp_path / "hf", "hf")
    weights = load_weights(old.folder)[0]
    overrides = ["loader.workers=0", "optimizer.warmup_steps=1", f"init_from={tmp_path / 'hf'}"]
    new = new_run("new", "zero1.json", 2, overrides)
    code, output = new.finish("steps=2", "checkpoint.every_steps=1", "checkpoint.keep=9")
    assert code == 0, output
    assert f"weights of {tmp_path / 'hf'}; the optimizer starts from scratch" in output
    first = min(committed(LocalPlace(new.folder / "checkpoints")), key=lambda saved: saved.step)
    got = load_weights(first.folder.path)[0]
    assert all(torch.equal(got[key], weights[key]) for key in weights)
