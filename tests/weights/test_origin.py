"""What a fine-tuned model takes over from a run or a file, and what starts anew, is what the original does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from support.weights_of_runs import a_run, stored, values
from torch import Tensor

from beit_dist.checkpoints.layout import Fragment
from beit_dist.config.model import HALF, IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, ModelConfig
from beit_dist.engine.initialisation import check_foreign, find_origin, initialise_from
from beit_dist.errors import CheckpointError, ConfigError, WeightsError
from beit_dist.models.classifier import ImageClassifier
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.vit import BeitBackbone
from beit_dist.weights.foreign import Foreign, read_file
from beit_dist.weights.names import BLOCK_TABLE, TABLE
from beit_dist.weights.origin import as_finetuned, backbone_of, finetuned_from_file, finetuned_from_run
from beit_dist.weights.resampling import resample_positions, resample_table

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "mlp_ratio": 3.0}
SHARED = BackboneConfig(**SIZES)
BLOCKS = BackboneConfig(**SIZES, block_positions=True)
PAPER = BackboneConfig(**SIZES, absolute_positions=True, relative_positions=False, layer_scale=0)
CLASSES = ("cat", "dog", "owl")
HEAD = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
ALL = pytest.mark.parametrize("config", [SHARED, BLOCKS, PAPER], ids=["shared", "blocks", "paper"])


def backbone(config: BackboneConfig) -> dict[str, list[int]]:
    model = BeitBackbone(config, masks=False, final_norm=False)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def classifier(config: BackboneConfig, classes: int = 3) -> dict[str, list[int]]:
    model = ImageClassifier(config, classes)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def pretrained(config: BackboneConfig = SHARED) -> dict[str, Tensor]:
    model = MaskedImageModel(ModelConfig(**config.model_dump(), vocabulary=64))
    return values({name: list(parameter.shape) for name, parameter in model.named_parameters()})


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# What is taken over


def test_the_shared_table_of_pre_training_becomes_that_of_each_block() -> None:
    weights = pretrained()
    found = as_finetuned(Foreign(weights, "d"), BLOCKS, classifier(BLOCKS), CLASSES)
    assert found.weights.keys() == backbone(BLOCKS).keys()
    assert all(torch.equal(found.weights[BLOCK_TABLE.format(block)], weights[TABLE]) for block in range(3))
    dropped = {"mask_token", "norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias"}
    assert found.left_out == sorted(dropped)
    assert found.may_lack == HEAD
    check_foreign("here", classifier(BLOCKS), found)
    kept = {name: tensor for name, tensor in weights.items() if name not in dropped | {TABLE}}
    assert_equal({name: found.weights[name] for name in kept}, kept)


def test_every_table_and_position_of_another_resolution_is_resampled_as_in_the_original() -> None:
    both = BackboneConfig(**SIZES, block_positions=True, absolute_positions=True)
    larger = both.model_copy(update={"image_size": 48})
    weights = values(classifier(both))
    found = as_finetuned(Foreign(weights, "d", classes=CLASSES), larger, classifier(larger), CLASSES)
    check_foreign("here", classifier(larger), found)
    for block in range(3):
        name = BLOCK_TABLE.format(block)
        assert torch.equal(found.weights[name], resample_table(weights[name], 6))
    assert torch.equal(found.weights["pos_embed"], resample_positions(weights["pos_embed"], 6))
    assert not torch.equal(found.weights[BLOCK_TABLE.format(0)], found.weights[BLOCK_TABLE.format(1)])


def test_tables_that_differ_do_not_fit_one_shared_table() -> None:
    with pytest.raises(
        WeightsError, match=r"blocks\.1.* differs from blocks\.0.*Give model\.block_positions=true"
    ):
        as_finetuned(Foreign(values(backbone(BLOCKS)), "d"), SHARED, backbone(SHARED), CLASSES)


def test_what_belongs_to_another_model_is_left_for_the_comparison_of_names() -> None:
    deeper = values(backbone(BLOCKS.model_copy(update={"depth": 4})))
    found = as_finetuned(Foreign(deeper, "d"), BLOCKS, classifier(BLOCKS), CLASSES)
    with pytest.raises(ConfigError, match=r"blocks\.3\.gamma_1 is not a parameter of this model"):
        check_foreign("here", classifier(BLOCKS), found)
    lacking = {name: tensor for name, tensor in values(backbone(BLOCKS)).items() if "blocks.2" not in name}
    found = as_finetuned(Foreign(lacking, "d"), BLOCKS, classifier(BLOCKS), CLASSES)
    with pytest.raises(ConfigError, match=r"blocks\.2\.gamma_1 is missing"):
        check_foreign("here", classifier(BLOCKS), found)


@pytest.mark.parametrize(
    ("theirs", "rows", "anew", "said"),
    [
        (CLASSES, 3, False, None),
        (("cat", "owl", "dog"), 3, True, r"class 1 is 'owl' there and 'dog' here"),
        (None, 3, False, "nothing names its 3 classes; they are taken for those of this data"),
        (None, 5, True, "it has 5 classes and this data 3, so the head starts from scratch"),
        (CLASSES, 5, True, "it has 5 classes and this data 3"),  # names of something else
    ],
)
def test_a_classifier_stays_if_its_classes_are_those_of_the_data(
    theirs: tuple[str, ...] | None, rows: int, anew: bool, said: str | None
) -> None:
    weights = values(classifier(BLOCKS, rows))
    found = as_finetuned(Foreign(weights, "d", classes=theirs), BLOCKS, classifier(BLOCKS), CLASSES)
    lost = {"head.weight", "head.bias"} if anew else set()
    assert weights.keys() - found.weights.keys() == lost == set(found.left_out)
    assert len(found.notes) == (said is not None)
    assert said is None or said in found.notes[0] or pytest.fail(found.notes[0])
    check_foreign("here", classifier(BLOCKS), found)


def test_a_classifier_on_the_class_token_starts_anew() -> None:
    weights = {name: t for name, t in values(classifier(BLOCKS)).items() if not name.startswith("fc_norm")}
    found = as_finetuned(Foreign(weights, "d", classes=CLASSES), BLOCKS, classifier(BLOCKS), CLASSES)
    assert found.left_out == ["head.bias", "head.weight"]
    assert "on the class token" in found.notes[0]


def test_a_segmentation_model_takes_the_backbone_of_a_classifier_and_the_heads_of_its_own_kind() -> None:
    heads = {
        "fpn1.0.weight": [2],
        "decode_head.bottleneck.conv.weight": [3],
        "decode_head.conv_seg.weight": [3, 4],
    }
    heads |= {"auxiliary_head.conv_seg.bias": [3], "fpn1.1.running_mean": [2]}
    shapes = {**backbone(BLOCKS), **heads}
    found = as_finetuned(Foreign(values(classifier(BLOCKS)), "d", classes=CLASSES), BLOCKS, shapes, CLASSES)
    assert (found.left_out, found.notes) == (sorted(HEAD), [])
    check_foreign("here", shapes, found)
    whole = values(shapes)
    assert_equal(as_finetuned(Foreign(whole, "d", classes=CLASSES), BLOCKS, shapes, CLASSES).weights, whole)
    others = as_finetuned(Foreign(whole, "d", classes=("a", "b", "c")), BLOCKS, shapes, CLASSES)
    assert others.left_out == ["auxiliary_head.conv_seg.bias", "decode_head.conv_seg.weight"]


# From where


def test_a_run_of_the_same_model_and_classes_is_read_part_by_part(tmp_path: Path) -> None:
    shapes, buffers = classifier(BLOCKS), {"fpn1.1.running_mean": [2]}
    run, weights = a_run(tmp_path / "r", "classification", shapes, BLOCKS, classes=CLASSES, buffers=buffers)
    there = stored(run)
    assert finetuned_from_run(there, BLOCKS, shapes | buffers, CLASSES) is None
    assert torch.equal(there.read("fpn1.1.running_mean"), weights["fpn1.1.running_mean"])
    found = finetuned_from_run(there, BLOCKS, classifier(BLOCKS) | buffers, ("a", "b", "c"))
    assert found is not None
    assert found.left_out == ["head.bias", "head.weight"]
    assert (found.checkpoint, found.digest) == ("step-00000005.a0001", "aa")
    assert_equal(found.weights, {n: t for n, t in weights.items() if not n.startswith("head.")})


@pytest.mark.parametrize(("name", "value"), [("heads", 4), ("pixel_mean", (0.4, 0.4, 0.4))])
def test_the_same_shapes_with_another_meaning_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    run, _ = a_run(tmp_path / "r", "classification", classifier(PAPER), PAPER, classes=CLASSES)
    other = PAPER.model_copy(update={name: value})
    with pytest.raises(ConfigError, match=rf"model\.{name}: got"):
        finetuned_from_run(stored(run), other, classifier(PAPER), CLASSES)


@pytest.mark.parametrize("kind", ["pretraining", "classification", "segmentation"])
@ALL
def test_the_backbone_of_a_run_of_any_kind_is_told_by_its_manifest(
    tmp_path: Path, kind: str, config: BackboneConfig
) -> None:
    config = config.model_copy(update={"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD})
    run, _ = a_run(tmp_path / "r", kind, backbone(config), config)
    assert BackboneConfig(**backbone_of(str(run))) == config
    assert BackboneConfig(**backbone_of(str(run / "checkpoints/step-00000005.a0001"))) == config


def test_what_has_no_backbone_is_refused(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path / "r", "tokenizer", {"a": [1]}, SHARED)
    with pytest.raises(
        CheckpointError, match="a tokenizer run, expected one of a pretraining or classification or"
    ):
        backbone_of(str(run))
    with pytest.raises(WeightsError, match="nothing does not exist, expected a run, or a local file"):
        backbone_of(str(tmp_path / "nothing"))
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: got no backbone of BEiT v1 \('patch_embed\.proj\.weight'\)"):
        backbone_of(str(tmp_path / "a.pth"))


@ALL
def test_the_backbone_of_a_file_is_told_by_its_shapes(tmp_path: Path, config: BackboneConfig) -> None:
    wide = BackboneConfig(**config.model_dump() | {"width": 128, "heads": 2})
    safetensors.torch.save_file(values(backbone(wide)), tmp_path / "a.safetensors")
    found = backbone_of(str(tmp_path / "a.safetensors"))
    assert not found.keys() & {"pixel_mean", "pixel_std"}
    assert BackboneConfig(**found) == wide


def test_what_a_file_does_not_say_is_said(tmp_path: Path) -> None:
    shapes = classifier(PAPER)
    safetensors.torch.save_file(values(shapes), tmp_path / "a.safetensors")
    notes = finetuned_from_file(str(tmp_path / "a.safetensors"), PAPER, shapes, CLASSES).notes
    assert any("does not say how pixels were normalised" in note for note in notes)
    assert "that file does not say how many heads there are; model.heads is 2" in notes


@pytest.mark.parametrize("form", ["hf", "timm", "hf without names"])
def test_names_of_classes_are_those_of_the_configuration_beside_the_file(tmp_path: Path, form: str) -> None:
    safetensors.torch.save_file(values(classifier(BLOCKS)), tmp_path / "model.safetensors")
    config: dict[str, Any] = {
        "hf": {"id2label": {"2": "owl", "0": "cat", "1": "dog"}},
        "timm": {"label_names": list(CLASSES), "pretrained_cfg": {"mean": list(HALF), "std": list(HALF)}},
        "hf without names": {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}},
    }[form]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_file(tmp_path).classes == (None if form == "hf without names" else CLASSES)


# Into the engine's state


def test_weights_and_buffers_of_another_kind_are_filled_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = classifier(BLOCKS)
    run, weights = a_run(
        tmp_path / "r", "pretraining", {n: list(t.shape) for n, t in pretrained().items()}, SHARED
    )
    monkeypatch.setattr("beit_dist.weights.stored.file_fault", lambda *_: "")
    task: Any = SimpleNamespace(
        kind="classification",
        other_origins=("pretraining",),
        config=SimpleNamespace(init_from=str(run), storage=SimpleNamespace(access=None)),
        network=lambda: ImageClassifier(BLOCKS, 3),
        from_stored=lambda there, loud: finetuned_from_run(there, BLOCKS, shapes, CLASSES),
    )
    held = {name: torch.full(shape, 7.0) for name, shape in shapes.items()}
    moments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state: Any = SimpleNamespace(
        held_fragments=lambda: [
            *(Fragment(name, "weight", 1, tensor.view(-1)[1:]) for name, tensor in held.items()),
            *(Fragment(name, "exp_avg", 0, tensor.view(-1)) for name, tensor in moments.items()),
        ],
        publish=lambda updates: None,
    )
    alone: Any = SimpleNamespace(ranks=SimpleNamespace(rank=0))
    origin = initialise_from(task, shapes, find_origin(task), state, alone)
    assert origin == {"source": str(run), "checkpoint": "step-00000005.a0001", "weights": "aa"}
    for name, tensor in held.items():
        there = weights[TABLE] if name.endswith("bias_table") else weights.get(name)
        expected = torch.full_like(tensor, 7.0) if there is None else there
        assert torch.equal(tensor.view(-1)[1:], expected.view(-1)[1:]), name
    assert not any(bool(moment.any()) for moment in moments.values())
    said = capsys.readouterr().out
    assert "start from scratch: fc_norm.weight, fc_norm.bias, head.weight, head.bias\n" in said
    assert "left out: lm_head.bias, lm_head.weight, mask_token, norm.bias, norm.weight\n" in said
