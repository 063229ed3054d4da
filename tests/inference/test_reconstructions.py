"""What a pre-trained model paints into the gaps is what its head predicts there, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.weights_of_runs import a_run, stored

import beit_dist
from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.model import ModelConfig
from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.images.decoding import unpatchify
from beit_dist.inference.pretrained import PretrainedModel
from beit_dist.models.dvae import DVAE
from beit_dist.models.mim import MaskedImageModel
from beit_dist.stream.masking.modes import masks_of
from beit_dist.weights.export import export_weights
from beit_dist.weights.stored import open_weights
from beit_dist.weights.tokenizer_files import load_tokenizer, save_tokenizer


@pytest.fixture(scope="session")
def model(pretrained: Path) -> PretrainedModel:
    found = beit_dist.load(pretrained)
    assert isinstance(found, PretrainedModel)
    return found


def test_tokens_are_those_that_the_head_predicts_behind_a_given_mask(
    model: PretrainedModel, photos: list[Path]
) -> None:
    mask = np.zeros((4, 4), np.bool_)
    mask[1:3, 0:2] = True
    for photo, found in zip(photos, model.reconstruct(photos, mask), strict=True):
        pixels = model.prepare(photo)
        assert found.name == str(photo)
        assert np.array_equal(found.image, pixels)
        assert np.array_equal(found.hidden, mask)
        positions = torch.tensor([[4, 5, 8, 9]])
        predicted = model.network.predict(model.patches_of(photo), positions)[0].argmax(-1)
        assert found.tokens is not None
        assert found.tokens[mask].tolist() == predicted.tolist()
        assert (found.tokens[~mask] == -1).all()
        large = np.kron(mask, np.ones((8, 8), np.bool_))
        assert np.array_equal(found.masked[~large], pixels[~large])
        assert len(np.unique(found.masked[large])) == 1


def test_the_runs_tokenizer_is_found_and_paints(
    model: PretrainedModel, pretrained: Path, photos: list[Path], runs: Path
) -> None:
    dvae = load_tokenizer(runs / "shards" / "tokenizer.safetensors")
    (found,) = model.reconstruct(photos[0], 0.5)
    pixels = torch.from_numpy(model.prepare(photos[0])).permute(2, 0, 1)[None]
    true = dvae.tokens(pixels)  # patches are as large as tokens here, so nothing is resized
    mixed = true.clone()
    mixed[0, found.hidden] = torch.from_numpy(found.tokens[found.hidden])
    for picture, tokens in zip(found.painted.values(), (true, mixed), strict=True):
        expected = (dvae.decode(tokens)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(picture, expected)
    right = (true == mixed)[0, found.hidden].float().mean()
    assert found.said == f"{100 * right:.0f} % right"
    (named,) = model.reconstruct(photos[0], 0.5, tokenizer=runs / "shards" / "tokenizer.safetensors")
    assert named.said == found.said
    (tensor,) = model.reconstruct(torch.from_numpy(model.prepare(photos[0])), 0.5, tokenizer=dvae)
    assert (tensor.tokens == found.tokens).all()


def test_masks_are_the_runs_own_or_of_a_share(
    model: PretrainedModel, photos: list[Path], pretrained: Path
) -> None:
    config = open_weights(pretrained).config
    masks = masks_of(config.masking, 4, 7)
    expected = masks.masked(np.zeros(5, np.int64), np.arange(5)).reshape(5, 4, 4)
    found = model.reconstruct(photos, seed=7)
    assert np.array_equal(np.stack([one.hidden for one in found]), expected)
    for share, count in ((0.5, 8), (0.1, 2), (0.9, 15)):
        first, again = (model.reconstruct(photos, share, seed=1) for _ in range(2))
        assert [int(one.hidden.sum()) for one in first] == [count] * 5
        assert all((one.hidden == other.hidden).all() for one, other in zip(first, again, strict=True))
    own = np.random.default_rng(0).random((5, 4, 4)) < 0.5
    assert np.array_equal(np.stack([one.hidden for one in model.reconstruct(photos, own)]), own)


def test_without_a_tokenizer_there_are_tokens_and_no_pictures(
    pretrained: Path, photos: list[Path], tmp_path: Path
) -> None:
    export_weights(open_weights(pretrained), tmp_path / "model.safetensors")
    model = beit_dist.load(tmp_path / "model.safetensors")
    assert isinstance(model, PretrainedModel)
    (found,) = model.reconstruct(photos[0])
    assert found.painted == {}
    assert found.said == ""
    assert found.tokens is not None
    assert found.tokens.max() >= 0


def test_pixels_are_painted_by_a_model_that_predicts_them(tmp_path: Path, photos: list[Path]) -> None:
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
    config = ModelConfig(**sizes, target="pixels", pixels={"normalise_patches": False})
    shapes = {name: list(tensor.shape) for name, tensor in MaskedImageModel(config).named_parameters()}
    run, _ = a_run(tmp_path / "run", "pretraining", shapes, config, tokenizer="t")
    export_weights(stored(run), tmp_path / "model.safetensors")
    model = beit_dist.load(tmp_path / "model.safetensors")
    assert isinstance(model, PretrainedModel)
    assert model.config.pixels == config.pixels
    mask = np.zeros((4, 4), np.bool_)
    mask[0, 3] = True
    (found,) = model.reconstruct(photos[0], mask)
    patches = model.patches_of(photos[0])
    predicted = model.network.predict(patches, torch.tensor([[3]]))
    expected = patches.clone()
    expected[0, 3] = ((predicted[0, 0] * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    (picture,) = found.painted.values()
    assert np.abs(picture.astype(int) - unpatchify(expected[0].numpy(), 8)).max() <= 1
    assert found.tokens is None
    assert found.said.startswith("loss ")


def test_what_cannot_be_reconstructed_is_refused(
    model: PretrainedModel, photos: list[Path], tmp_path: Path
) -> None:
    for masked, said in (
        (np.zeros((4, 4), np.bool_), "a mask that hides all or nothing"),
        (np.ones((5, 4, 4), np.bool_), "a mask that hides all or nothing"),
        (np.zeros((3, 3), np.bool_), r"got 'bool \(3, 3\)', expected bool \(4, 4\) or \(5, 4, 4\)"),
        (np.ones((4, 4)), "got 'float64"),
        (0.0, "masked: got 0.0, expected a share between 0 and 1 that leaves one of the 16 patches"),
        (1, "masked: got 1.0, expected a share between 0 and 1"),
        (0.99, "masked: got 0.99, expected a share"),
        (True, "got True, expected bool"),
        ("0.4", "got '0.4', expected bool"),
    ):
        with pytest.raises(ConfigError, match=said):
            model.reconstruct(photos, masked)
    config = DVAEConfig(vocabulary=64, hidden=8, blocks_per_group=1, decoder_input=8)
    save_tokenizer(tmp_path / "other.safetensors", DVAE(config, seed=1), config)
    with pytest.raises(TokenizerError, match="got digest"):
        model.reconstruct(photos, tokenizer=tmp_path / "other.safetensors")
    with pytest.raises(TokenizerError):
        model.reconstruct(photos, tokenizer=photos[0])
