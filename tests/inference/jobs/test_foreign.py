"""Weights of Hugging Face and timm are embedded as the model from which they come."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fine_tuned_peers import hf_config, randomise
from support.mixed_images import Mixed

from beit_dist.commands.embed import main
from beit_dist.config.model import BackboneConfig
from beit_dist.images.decoding import decode
from beit_dist.inference.loading import load
from beit_dist.weights.ecosystem import export_elsewhere
from beit_dist.weights.stored import open_weights


def embedded(source: Path, mixed: Mixed, out: Path) -> dict[str, np.ndarray]:
    words = [
        "--images",
        *mixed.sources,
        "--out",
        str(out),
        "--device",
        "cpu",
        "--layers",
        "1,3",
        "--token",
        "both",
    ]
    assert main([str(source), *words]) == 0
    return dict(np.load(out))


@pytest.mark.parametrize("form", ["hf", "timm"])
def test_an_export_has_the_features_of_its_run(pretrained: Path, mixed: Mixed, tmp_path: Path, form: str) -> None:
    export_elsewhere(open_weights(str(pretrained)), tmp_path / form, form)
    run, export = (
        embedded(source, mixed, tmp_path / f"{source.name}.npz") for source in (pretrained, tmp_path / form)
    )
    about = [json.loads(str(each.pop("beit_dist"))) for each in (run, export)]
    assert run.keys() == export.keys() == {"source", "name", "label", "mean_1", "class_1", "mean_3", "class_3"}
    for name, values in run.items():
        np.testing.assert_array_equal(values, export[name])
    assert about[0]["facts"]["images"] == about[1]["facts"]["images"]


def test_a_model_that_hugging_face_wrote_has_its_hidden_states(
    mixed: Mixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    config = BackboneConfig(width=32, depth=3, heads=2, image_size=32, patch_size=8, block_positions=True)
    peer = randomise(transformers.BeitForImageClassification(hf_config(config, num_labels=4))).eval()
    peer.save_pretrained(tmp_path / "peer")
    found = embedded(tmp_path / "peer", mixed, tmp_path / "f.npz")
    assert "note    that file does not say how pixels were normalised" in capsys.readouterr().out
    model = load(tmp_path / "peer")
    pixels = torch.stack([torch.from_numpy(model.prepare(decode(raw))) for _, _, _, raw in mixed.good])
    with torch.no_grad():
        hidden = peer(model.normalise(pixels), output_hidden_states=True).hidden_states
    for layer in (1, 3):
        for name, expected in (("class", hidden[layer][:, 0]), ("mean", hidden[layer][:, 1:].mean(1))):
            got = torch.from_numpy(found[f"{name}_{layer}"])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
