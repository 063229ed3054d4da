"""Features are those that probes see, whatever form images arrive in, and flow through as any module's do."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import beit_dist
from beit_dist.config.labelled import AugmentationConfig
from beit_dist.errors import ConfigError
from beit_dist.images.decoding import decode, patchify
from beit_dist.images.labelled.views import ClassificationView
from beit_dist.inference.pretrained import PretrainedModel
from beit_dist.probing.features import features_of, frozen
from beit_dist.probing.origin import open_origin
from beit_dist.storage.access import Access


@pytest.fixture(scope="session")
def model(pretrained: Path) -> PretrainedModel:
    found = beit_dist.load(pretrained)
    assert isinstance(found, PretrainedModel)
    return found


def probed(source: Path, files: list[Path], layers: list[int]) -> Tensor:
    """As ``beit probe`` has them: (L, B, 2 · C)."""
    origin = open_origin(str(source), ema=False, access=Access())
    view = ClassificationView(origin.config, AugmentationConfig())
    pixels = [patchify(view.centred(decode(file.read_bytes())), 8) for file in files]
    backbone = frozen(origin.config, origin.weights, torch.device("cpu"))
    return features_of(backbone, torch.from_numpy(np.stack(pixels)), layers)


def test_features_of_paths_are_what_beit_probe_sees(
    model: PretrainedModel, pretrained: Path, segments: Path, photos: list[Path]
) -> None:
    found = model.features(photos, layers=[1, 2, 3])
    for layer, expected in zip((1, 2, 3), probed(pretrained, photos, [1, 2, 3]), strict=True):
        assert torch.equal(found[layer].pooled, expected)
    fine_tuned = beit_dist.load(segments)
    assert torch.equal(fine_tuned.features(photos, 2).pooled, probed(segments, photos, [2])[0])


def test_shapes_and_default_layers(model: PretrainedModel, classes: Path, photos: list[Path]) -> None:
    found = model.features(photos[0])
    assert found.layer == model.default_layer == 2  # of three
    assert found.tokens.shape == (1, 17, 32)
    assert found.class_token.shape == found.patch_mean.shape == (1, 32)
    assert found.pooled.shape == (1, 64)
    assert found.patch_grid.shape == (1, 32, 4, 4)
    assert torch.equal(found.patch_grid[0, :, 1, 2], found.tokens[0, 1 + 6])
    assert torch.allclose(found.patch_grid.mean((2, 3)), found.patch_mean, atol=1e-6)
    assert beit_dist.load(classes).default_layer == 3
    assert list(model.features(photos[0], layers=np.array([3, 1]))) == [1, 3]
    for wrong in (4, 0, -1, "9", 1.5, [1, None], []):
        with pytest.raises(ConfigError, match=r"layers: got .*, expected numbers from 1 .* to 3"):
            model.features(photos, layers=wrong)


def test_images_are_the_same_in_every_form(model: PretrainedModel, photos: list[Path]) -> None:
    expected = model.features(photos).pooled
    prepared = torch.from_numpy(np.stack([model.prepare(photo) for photo in photos]))
    assert prepared.shape == (5, 32, 32, 3)
    forms = {
        "str": [str(photo) for photo in photos],
        "bytes": [photo.read_bytes() for photo in photos],
        "pillow": [Image.open(photo) for photo in photos],
        "arrays": [np.asarray(Image.open(photo)) for photo in photos],
        "generator": (photo for photo in photos),
        "prepared": prepared,
        "channels first": prepared.permute(0, 3, 1, 2),
        "list of tensors": list(prepared),
    }
    for form, images in forms.items():
        assert torch.equal(model.features(images).pooled, expected), form
    normalised = model.normalise(prepared)
    assert normalised.shape == (5, 3, 32, 32)
    assert torch.allclose(normalised, (prepared.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    for images in (normalised, normalised.double(), list(normalised)):
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.features(normalised[0]).pooled, model(normalised[:1]))
    stack = np.stack([np.asarray(Image.open(photos[0]))] * 2)
    assert torch.equal(model.features(stack).pooled, expected[:1].expand(2, -1))


def test_a_backbone_is_fine_tuned_as_any_module(model: PretrainedModel, photos: list[Path]) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    trained = nn.Sequential(copy.deepcopy(model).requires_grad_(True), nn.Linear(64, 2)).train()
    images = model.normalise(torch.from_numpy(np.stack([model.prepare(photo) for photo in photos[:2]])))
    images.requires_grad_(True)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(trained(images), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert images.grad is not None
    assert torch.equal(
        model.network.cls_token, beit_dist.load(model.provenance.name.split(",")[0]).network.cls_token
    )


def test_copies_pickles_and_states_are_whole(model: PretrainedModel, photos: list[Path], tmp_path: Path) -> None:
    expected = model.features(photos).pooled
    again = pickle.loads(pickle.dumps(model))
    torch.save(model.state_dict(), tmp_path / "state.pth")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    assert not torch.allclose(other.features(photos).pooled, expected)
    assert torch.equal(model.features(photos).pooled, expected)
    other.load_state_dict(torch.load(tmp_path / "state.pth"))
    for one in (again, other):
        assert torch.equal(one.features(photos).pooled, expected)
        assert one.reconstruct(photos[0])[0].tokens.max() >= 0


def test_other_precisions(model: PretrainedModel, pretrained: Path, photos: list[Path]) -> None:
    expected = model.features(photos).pooled
    for dtype in (torch.bfloat16, torch.float64):
        other = beit_dist.load(pretrained, dtype=dtype)
        found = other.features(photos)
        assert (found.tokens.dtype, found.pooled.dtype) == (dtype, torch.float32)
        assert (found.pooled - expected).norm() / expected.norm() < (0.02 if dtype == torch.bfloat16 else 1e-6)
        images = torch.zeros(1, 3, 32, 32, dtype=dtype)
        assert other(images).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = model.features(photos)
    assert (found.pooled - expected).norm() / expected.norm() < 0.02
    trained = copy.deepcopy(model).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trained(torch.zeros(2, 3, 32, 32)).square().sum()
    loss.backward()
    gradient = trained.network.patch_embed.proj.bias.grad
    assert gradient is not None
    assert gradient.isfinite().all()


def test_attention_is_what_the_blocks_compute(model: PretrainedModel, segments: Path, photos: list[Path]) -> None:
    for loaded in (model, beit_dist.load(segments)):  # one table of positions for all blocks, and one for each
        for layer in (1, 3):
            maps = loaded.attention(photos, layer)
            assert maps.shape == (5, 2, 17, 17)
            assert torch.allclose(maps.sum(-1), torch.ones(5, 2, 17), atol=1e-5)
            block, seen = loaded.network.blocks[layer - 1].attn, []
            hook = block.proj.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
            values = []
            other = block.qkv.register_forward_hook(lambda _, __, made, values=values: values.append(made))
            loaded.features(photos, layer)
            hook.remove(), other.remove()
            value = values[0].view(5, 17, 3, 2, 16)[:, :, 2].transpose(1, 2)
            mixed = (maps @ value).transpose(1, 2).flatten(2)
            assert torch.allclose(mixed, seen[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.attention(photos), model.attention(photos, 3))
    with pytest.raises(ConfigError, match="layer: got 0"):
        model.attention(photos, 0)
