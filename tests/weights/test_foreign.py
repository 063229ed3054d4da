"""Weights that Hugging Face, timm and the original wrote, in every form they come in, compute the same here.

timm's ``Beit`` with a shared bias stands for the original's class: it has its names and its layout.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.timm_beit import timm_beit_class, timm_settings
from torch import Tensor, nn

from beit_dist.config.model import HALF, IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.initialisation import check_foreign
from beit_dist.errors import ConfigError, WeightsError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.weights.foreign import is_foreign, read_foreign

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}
RELEASED = ModelConfig(**SIZES)
PAPER = ModelConfig(**SIZES, absolute_positions=True, relative_positions=False, layer_scale=0)
BOTH = pytest.mark.parametrize("config", [RELEASED, PAPER], ids=["released", "paper"])
HEAD = {"mask_token", "lm_head.weight", "lm_head.bias"}
NORM = {"norm.weight", "norm.bias"}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(middle, 0.2, generator=generator)


@pytest.fixture
def hf() -> Callable[..., Any]:
    """One of Hugging Face's classes at our size, with random values in every tensor."""
    transformers: Any = pytest.importorskip("transformers", reason="transformers needs Python 3.11")

    def make(kind: str, config: ModelConfig = RELEASED, **changes: Any) -> Any:
        settings = {
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.width,
            "vocab_size": config.vocabulary,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "layer_norm_eps": 1e-6,
            "use_mask_token": kind == "BeitForMaskedImageModeling",
            "use_absolute_position_embeddings": config.absolute_positions,
            "use_shared_relative_position_bias": config.relative_positions,
            "layer_scale_init_value": config.layer_scale,
            "out_indices": [0, 1, 2, 3],
            **changes,
        }
        model = getattr(transformers, kind)(transformers.BeitConfig(**settings)).eval()
        randomise(model)
        return model

    return make


@pytest.fixture
def timm_beit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """timm's class at our size, with random values in every tensor."""
    kind = timm_beit_class(monkeypatch)

    def make(config: ModelConfig = RELEASED, **changes: Any) -> Any:
        model = kind(**timm_settings(config, shared_bias=True) | changes).eval()
        randomise(model)
        return model

    return make


def read(source: Path, config: ModelConfig = RELEASED) -> tuple[dict[str, Tensor], Any]:
    """What a run would start from: read, and found to be of this model."""
    assert is_foreign(str(source))
    found = read_foreign(source, config)
    recipe = PretrainingConfig(run="r", init_from=str(source), model=config.model_dump(), masking={"min_block": 4})
    shapes = {name: list(p.shape) for name, p in MaskedImageModel(config).named_parameters()}
    check_foreign(str(source), shapes, Pretraining(recipe).foreign(str(source)))
    return found.weights, found


def features(weights: dict[str, Tensor], config: ModelConfig = RELEASED) -> tuple[Tensor, Tensor]:
    """Normalised images, and what our model of these weights makes of them; without a norm if they have none."""
    model = MaskedImageModel(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= HEAD | NORM
    if "norm.weight" not in weights:
        model.norm = nn.Identity()  # type: ignore[assignment]
    side, size = config.grid, config.patch_size
    pixels = torch.randint(0, 256, (2, 3, side * size, side * size), generator=torch.Generator().manual_seed(4))
    patches = pixels.view(2, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1).reshape(2, side * side, -1)
    with torch.no_grad():
        return (pixels / 255 - 0.5) / 0.5, model.encode(patches.to(torch.uint8))


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# Hugging Face


@BOTH
def test_hugging_faces_checkpoints_of_all_kinds_of_file_compute_the_same(
    tmp_path: Path, config: ModelConfig, hf: Callable[..., Any]
) -> None:
    model = hf("BeitForMaskedImageModeling", config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    tensors = safetensors.torch.load_file(tmp_path / "one/model.safetensors")
    for name in ("bin", "bins"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "one/config.json", tmp_path / name)
    torch.save(tensors, tmp_path / "bin/pytorch_model.bin")
    places = {name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, name in enumerate(tensors)}
    for part in set(places.values()):
        torch.save({n: t for n, t in tensors.items() if places[n] == part}, tmp_path / "bins" / part)
    (tmp_path / "bins/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))

    weights, found = read(tmp_path / "one", config)
    assert found.known == {"heads": 2}
    assert not found.left_out
    assert not found.notes
    for form in ("parts", "bin", "bins", "bin/pytorch_model.bin", "one/model.safetensors"):
        other, _ = read(tmp_path / form, config)
        assert other.keys() == weights.keys()
        assert all(torch.equal(other[name], weights[name]) for name in weights), form
    pixels, ours = features(weights, config)
    with torch.no_grad():
        assert_near(ours, model.layernorm(model.beit(pixels).last_hidden_state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_stored_in_half_precision_become_fp32_exactly(
    tmp_path: Path, hf: Callable[..., Any], dtype: torch.dtype
) -> None:
    model = hf("BeitForMaskedImageModeling").to(dtype)
    model.save_pretrained(tmp_path)
    weights, _ = read(tmp_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight.float())


def test_a_classifiers_head_and_pooled_norm_are_left_out_by_name(tmp_path: Path, hf: Callable[..., Any]) -> None:
    model = hf("BeitForImageClassification", num_labels=5)
    model.save_pretrained(tmp_path)
    weights, found = read(tmp_path)
    assert found.left_out == [f"{name}.{part}" for name in ("fc_norm", "head") for part in ("bias", "weight")]
    assert MaskedImageModel(RELEASED).state_dict().keys() - weights.keys() == HEAD | NORM
    pixels, ours = features(weights)
    with torch.no_grad():
        assert_near(ours, model.beit(pixels).last_hidden_state)


@pytest.mark.parametrize("pooled", [True, False])
def test_the_bare_model_has_no_prefix_and_sometimes_a_norm(
    tmp_path: Path, hf: Callable[..., Any], pooled: bool
) -> None:
    model = hf("BeitModel", use_mean_pooling=pooled)
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any(name.startswith(("embeddings.", "beit.embeddings.")) for name in tensors)
    bare = {name.removeprefix("beit."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(bare, tmp_path / "model.safetensors")
    weights, _ = read(tmp_path)
    assert MaskedImageModel(RELEASED).state_dict().keys() - weights.keys() == (HEAD | NORM if pooled else HEAD)
    pixels, ours = features(weights)
    with torch.no_grad():
        assert_near(ours, model(pixels).last_hidden_state)


def test_a_segmentation_models_neck_and_heads_are_left_out(tmp_path: Path, hf: Callable[..., Any]) -> None:
    hf("BeitForSemanticSegmentation", num_labels=5).save_pretrained(tmp_path)
    weights, found = read(tmp_path)
    assert {name.partition(".")[0] for name in found.left_out} >= {"decode_head", "auxiliary_head"}
    assert MaskedImageModel(RELEASED).state_dict().keys() - weights.keys() == HEAD | NORM


def test_what_ours_cannot_hold_or_computes_otherwise_is_said(tmp_path: Path, hf: Callable[..., Any]) -> None:
    shared = {"use_shared_relative_position_bias": False, "use_relative_position_bias": True}
    hf("BeitForImageClassification", **shared).save_pretrained(tmp_path / "blocks")
    with pytest.raises(
        WeightsError, match=r"blocks\.1\.attn\.relative_position_bias_table differs from blocks\.0"
    ):
        read(tmp_path / "blocks")
    hf("BeitForMaskedImageModeling", use_mean_pooling=False).save_pretrained(tmp_path / "norms")
    with pytest.raises(WeightsError, match=r"two tensors for norm\.(weight|bias).*use_mean_pooling=false"):
        read(tmp_path / "norms")
    hf("BeitForMaskedImageModeling", hidden_act="relu").save_pretrained(tmp_path / "relu")
    with pytest.raises(WeightsError, match="hidden_act: got 'relu', expected 'gelu'"):
        read(tmp_path / "relu")
    hf("BeitForMaskedImageModeling", layer_norm_eps=1e-12).save_pretrained(tmp_path / "eps")
    assert read(tmp_path / "eps")[1].notes == [
        "its config.json has layer_norm_eps 1e-12; this run uses 1e-06, as the original does"
    ]
    hf("BeitForMaskedImageModeling", num_attention_heads=4).save_pretrained(tmp_path / "heads")
    with pytest.raises(ConfigError, match=r"model\.heads: got 2, expected 4, with which"):
        read(tmp_path / "heads")


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        ({"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}, (IMAGENET_MEAN, IMAGENET_STD)),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}, (HALF, HALF)),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, ((0, 0, 0), (1, 1, 1))),
    ],
)
def test_the_normalisation_is_that_of_the_image_processor(
    tmp_path: Path, hf: Callable[..., Any], look: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    hf("BeitForMaskedImageModeling").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(look))
    known = read_foreign(tmp_path, RELEASED).known
    assert (known["pixel_mean"], known["pixel_std"]) == expected
    right = RELEASED.model_copy(update={"pixel_mean": expected[0], "pixel_std": expected[1]})
    read(tmp_path, right)
    near = right.model_copy(update={"pixel_std": tuple(value + 1e-8 for value in expected[1])})
    read(tmp_path, near)
    with pytest.raises(ConfigError, match=r"model\.pixel_mean"):
        read(tmp_path, right.model_copy(update={"pixel_mean": (0.4, 0.4, 0.4)}))
    for other in ({"do_rescale": False}, {"rescale_factor": 1}, {"rescale_factor": 1.0}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(look | other))
        with pytest.raises(WeightsError, match="not divided by 255"):
            read(tmp_path)


# timm and the original


def test_timms_fine_tuned_models_head_and_norm_are_left_out(tmp_path: Path, timm_beit: Callable[..., Any]) -> None:
    model = timm_beit(num_classes=5, global_pool="avg", use_shared_rel_pos_bias=False, use_rel_pos_bias=True)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"blocks\.1\.attn\.relative_position_bias_table differs from blocks\.0"
    ):
        read(tmp_path)
    for block in model.blocks:
        block.attn.relative_position_bias_table.data.copy_(model.blocks[0].attn.relative_position_bias_table)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    weights, found = read(tmp_path)
    assert found.left_out == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert MaskedImageModel(RELEASED).state_dict().keys() - weights.keys() == HEAD | NORM
    pixels, ours = features(weights)
    with torch.no_grad():
        assert_near(ours, model.forward_features(pixels))


def as_itself(state: dict[str, Tensor]) -> Any:
    return state


def of_pre_training(state: dict[str, Tensor]) -> Any:
    """As the original's pre-training writes it: with optimizer, scaler and a Namespace."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1.5e-3, 3)[1]  # from its schedule, which is an array
    arguments = argparse.Namespace(model="beit", opt_betas=[0.9, 0.999], imagenet_default_mean_and_std=False)
    scaler = {"scale": 65536.0, "_growth_tracker": 3}
    return {"model": state, "optimizer": optimizer.state_dict(), "epoch": 7, "scaler": scaler, "args": arguments}


def of_deepspeed(state: dict[str, Tensor]) -> Any:
    """Saved by DeepSpeed in the original's fine-tuning."""
    return {"module": state, "global_steps": 3, "dp_world_size": 8}


def of_data_parallel(state: dict[str, Tensor]) -> Any:
    return {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 1}


def of_segmentation(state: dict[str, Tensor]) -> Any:
    """As mmsegmentation writes it."""
    inner = {f"backbone.{name}": tensor for name, tensor in state.items()}
    inner["backbone.fpn1.0.weight"] = inner["decode_head.conv_seg.weight"] = torch.ones(2)
    inner["auxiliary_head.convs.0.bn.num_batches_tracked"] = torch.tensor(5)
    return {"meta": {"CLASSES": ("wall", "sky"), "iter": 3}, "state_dict": inner, "optimizer": {"state": {}}}


WRAPS = [as_itself, of_pre_training, of_deepspeed, of_data_parallel, of_segmentation]


@BOTH
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_originals_files_are_read_however_they_are_wrapped(
    tmp_path: Path, config: ModelConfig, timm_beit: Callable[..., Any], wrap: Callable[..., Any], zipped: bool
) -> None:
    model = timm_beit(config)
    head = {"lm_head.weight": torch.randn(64, 32), "lm_head.bias": torch.randn(64)}
    state = model.state_dict() | head | {"mask_token": torch.randn(1, 1, 32)}
    if config.relative_positions:
        state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    weights, found = read(path, config)
    assert weights.keys() == MaskedImageModel(config).state_dict().keys()
    pixels, ours = features(weights, config)
    with torch.no_grad():
        assert_near(ours, model.forward_features(pixels))
    assert found.known == ({"pixel_mean": HALF, "pixel_std": HALF} if wrap is of_pre_training else {})
    assert len(found.left_out) == (2 if wrap is of_segmentation else 0)


def unilm_state(config: ModelConfig = RELEASED) -> dict[str, Tensor]:
    """Under the original's names, but for the patches' convolution, which is flat as ours."""
    model = MaskedImageModel(config)
    randomise(model)
    return model.state_dict()


TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK = "blocks.{}.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.1.attn.extra": torch.ones(2)}, r"blocks\.1\.attn\.extra is not a parameter"),
        ({"dist_token": torch.ones(1, 1, 32)}, r"dist_token is not a parameter"),
        ({"blocks.2.norm2.weight": None}, r"blocks\.2\.norm2\.weight is missing"),
        (
            {"cls_token": torch.full((1, 1, 32), torch.nan)},
            r"cls_token: got torch\.float32 values that are",
        ),
        (
            {"cls_token": torch.full((1, 1, 32), 1e300, dtype=torch.float64)},
            r"cls_token: got torch\.float64 values",
        ),
        ({"blocks.0.gamma_1": torch.ones(32, dtype=torch.int8)}, r"blocks\.0\.gamma_1: got torch\.int8 values"),
        (
            {BLOCK.format(block): torch.zeros(52, 2) for block in range(3)},
            rf"tables of both kinds \(blocks\.0\.attn.* and {TABLE}",
        ),
        ({TABLE: None, BLOCK.format(0): torch.zeros(52, 2)}, "and other blocks have no table"),
        ({TABLE: torch.zeros(53, 2)}, "table of 53 rows fits no square grid"),
        ({TABLE: torch.zeros(12, 2)}, "table of 12 rows is too small to be resampled"),
        ({TABLE: torch.zeros(52)}, r"must have 2 dimensions, not the shape \[52\]"),
        ({"pos_embed": torch.zeros(1, 18, 32)}, r"pos_embed of size \[1, 18, 32\] fits no square grid"),
        ({"pos_embed": torch.zeros(1, 17, 32)}, r"pos_embed is not a parameter"),
        ({"blocks.0.attn.qkv.bias": torch.ones(96)}, r"qkv\.bias: got key biases that are not zero"),
        (
            {"blocks.0.attn.qkv.bias": torch.tensor(1.0)},
            r"a\.pth: got tensors in shapes that no BEiT v1 model has",
        ),
        ({"pos_embed": torch.zeros(2, 5, 4)}, r"a\.pth: got tensors in shapes that no BEiT v1 model has"),
        (
            {"patch_embed.proj.weight": torch.zeros(32, 3, 16, 16)},
            r"model\.patch_size: got 8, but .* patches of 16 pixels",
        ),
    ],
)
def test_tensors_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    state = unilm_state() | change
    torch.save({"model": {n: t for n, t in state.items() if t is not None}}, tmp_path / "a.pth")
    with pytest.raises((WeightsError, ConfigError), match=said):
        read(tmp_path / "a.pth")


def test_an_index_names_files_beside_it_that_exist(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "config.json").write_text("{}")
    for places, said in (
        ({"a": "../../etc/passwd"}, "no weight_map, expected one"),
        ({"a": 3}, "no weight_map, expected one"),
        ({}, "no weight_map, expected one"),
        ({"a": "model-00001-of-00001.safetensors"}, "model-00001-of-00001.safetensors: cannot be read"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(WeightsError, match=said):
            read_foreign(tmp_path, RELEASED)
    index.write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        read_foreign(tmp_path, RELEASED)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="expected a JSON object"):
        read_foreign(tmp_path, RELEASED)
    index.unlink()
    with pytest.raises(WeightsError, match=r"got no model\.safetensors, expected it beside config\.json"):
        read_foreign(tmp_path, RELEASED)
