"""Whatever is probed, its features are those of the model that it was written by."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fine_tuned_peers import a_batch, hf_config, hf_images, randomise
from support.weights_of_runs import a_run

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError, WeightsError
from beit_dist.models.classifier import ImageClassifier
from beit_dist.probing import origin as origins
from beit_dist.probing.features import features_of, frozen
from beit_dist.probing.origin import open_origin
from beit_dist.storage.access import Access
from beit_dist.weights.stored import open_weights

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8}
BLOCKS = BackboneConfig(**SIZES, block_positions=True)
PAPER = BackboneConfig(**SIZES, absolute_positions=True, relative_positions=False, layer_scale=0)


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers needs Python 3.11")


@pytest.mark.parametrize("config", [BLOCKS, PAPER], ids=["blocks", "paper"])
def test_features_of_a_model_of_hugging_face_are_of_its_hidden_states(
    tmp_path: Path, transformers: Any, config: BackboneConfig
) -> None:
    peer = randomise(transformers.BeitForImageClassification(hf_config(config, num_labels=4))).eval()
    peer.save_pretrained(tmp_path)
    origin = open_origin(str(tmp_path), ema=False, access=Access())
    assert origin.notes[0].startswith(
        "that file does not say how pixels were normalised: mean and deviation of 0.5"
    )
    patches = a_batch(config)
    with torch.no_grad():
        hidden = peer(hf_images(config, patches), output_hidden_states=True).hidden_states
    backbone = frozen(origin.config, origin.weights, torch.device("cpu"))
    for got, tokens in zip(features_of(backbone, patches, [1, 2, 3]), hidden[1:], strict=True):
        expected = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), 1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_fine_tuned_run_is_probed_without_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "open_weights", partial(open_weights, verify=False))  # its files have no digests
    shapes = {name: list(tensor.shape) for name, tensor in ImageClassifier(BLOCKS, 4).named_parameters()}
    run, weights = a_run(tmp_path / "run", "classification", shapes, BLOCKS, classes=["a", "b", "c", "d"])
    origin = open_origin(str(run), ema=False, access=Access())
    assert origin.config == BLOCKS
    assert weights.keys() - origin.weights.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in origin.weights.items())


def test_what_is_no_model_is_refused(tmp_path: Path, transformers: Any) -> None:
    with pytest.raises(WeightsError, match="missing does not exist, expected a run, or a local file"):
        open_origin(str(tmp_path / "missing"), ema=False, access=Access())
    transformers.BeitModel(hf_config(PAPER)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"--ema: got .*, expected a run"):
        open_origin(str(tmp_path), ema=True, access=Access())
