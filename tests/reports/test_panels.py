"""The panel: samples as they lie in shards, masks of the run, tokens decoded back into pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.masking import MaskingConfig
from beit_dist.config.model import ModelConfig
from beit_dist.errors import ConfigError, SampleError, TokenizerError
from beit_dist.images.decoding import unpatchify
from beit_dist.inference.painting import pixel_painter, token_painter
from beit_dist.inference.tokenizers import check_tokenizer
from beit_dist.models.dvae import DVAE
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.panels import check_fit, draw_panel, reconstruct
from beit_dist.reports.samples import read_spread
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.local import LocalPlace
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.masking.modes import masks_of
from beit_dist.weights.tokenizer_files import digests_of

MODEL = ModelConfig(width=16, depth=1, heads=2, image_size=32, patch_size=8, vocabulary=64)
MakeShards = Callable[..., Manifest]


def a_model(target: str = "tokens") -> MaskedImageModel:
    model = MaskedImageModel(MODEL.model_copy(update={"target": target}))
    model.initialise(0)
    return model


def a_tokenizer() -> DVAE:
    dvae = DVAE(DVAEConfig(vocabulary=64, hidden=8, blocks_per_group=1, decoder_input=8)).eval()
    dvae.digest = "0" * 64  # what the test's shards say made their tokens
    return dvae


def masks() -> Masks:
    return masks_of(MaskingConfig(mode="exact", masked_patches=6, min_block=4), MODEL.grid, seed=0)


def test_samples_are_spread_over_the_first_view(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path, shard_samples=[8, 8, 5], views=2)
    samples = read_spread(LocalPlace(tmp_path), manifest, 3)
    assert [sample.sample_id for sample in samples] == [0, 7, 14]
    assert samples[0].patches.shape == (16, 192)
    assert samples[0].tokens.shape == (16,)
    assert [sample.source for sample in samples] == ["image-0.png", "image-7.png", "image-14.png"]
    assert len(read_spread(LocalPlace(tmp_path), manifest, 100)) == 21


def test_a_damaged_sample_is_named(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    path = tmp_path / manifest.shards[0].name
    raw = bytearray(path.read_bytes())
    raw[manifest.layout.patches_start + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SampleError, match=r"v00/shard-000000\.tar, sample 0"):
        read_spread(LocalPlace(tmp_path), manifest, 1)


def test_predictions_take_the_place_of_masked_tokens_only(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    samples = read_spread(LocalPlace(tmp_path), manifest, 2)
    model, dvae = a_model(), a_tokenizer()
    decoded: list[torch.Tensor] = []
    decode = dvae.decode

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(tokens)
        return decode(tokens)

    dvae.decode = watched  # type: ignore[assignment]
    columns = reconstruct(model, samples, masks(), token_painter(dvae, 0.056))

    truth, painted = (tokens.flatten(1) for tokens in decoded)
    for row, (sample, column) in enumerate(zip(samples, columns, strict=True)):
        positions = torch.from_numpy(masks().positions(0, sample.sample_id)).long()
        guesses = model.predict(torch.from_numpy(sample.patches)[None], positions[None])[0].argmax(-1)
        expected = torch.from_numpy(sample.tokens).long()
        assert torch.equal(truth[row], expected)
        right = int((guesses == expected[positions]).sum())
        expected[positions] = guesses
        assert torch.equal(painted[row], expected)
        assert column.said == f"{100 * right / 6:.0f} % right,\n6 % by guessing"
        assert list(column.painted) == ["true tokens, decoded", "masked tokens predicted, decoded"]


def test_masked_patches_are_grey_and_others_untouched(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    sample = read_spread(LocalPlace(tmp_path), manifest, 1)[0]
    column = reconstruct(a_model(), [sample], masks(), token_painter(a_tokenizer()))[0]
    positions = set(masks().positions(0, sample.sample_id).tolist())
    for patch in range(16):
        y, x = divmod(patch, 4)
        area = np.s_[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        if patch in positions:
            assert len(np.unique(column.masked[area])) == 1
        else:
            assert np.array_equal(column.masked[area], column.image[area])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, make_shards: MakeShards) -> None:
    model, dvae = a_model(), a_tokenizer()
    manifest = make_shards(tmp_path / "fits")
    check_fit(model, manifest)
    check_tokenizer(dvae, manifest.tokenizer)
    other = make_shards(tmp_path / "other", vocabulary=32)
    with pytest.raises(ConfigError, match="vocabulary"):
        check_fit(model, other)
    check_fit(a_model("pixels"), other)
    dvae.digest = "1" * 64
    with pytest.raises(TokenizerError, match="--tokenizer"):
        check_tokenizer(dvae, manifest.tokenizer)
    alone = DVAE(dvae.config.model_copy(update={"decoder_input": 0}))
    alone.digest = "0" * 64
    with pytest.raises(TokenizerError, match=r"without a decoder.*beit convert encoder\.pkl decoder\.pkl"):
        check_tokenizer(alone, manifest.tokenizer)


def test_shards_made_with_the_encoder_alone_are_drawn_by_the_whole_tokenizer(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    dvae = a_tokenizer()
    dvae.digest, without_decoder = digests_of(dvae)
    manifest = dataclasses.replace(make_shards(tmp_path), tokenizer=without_decoder)
    check_tokenizer(dvae, manifest.tokenizer)
    with torch.no_grad():
        dvae.encoder.blocks.input.b += 1
    with pytest.raises(TokenizerError, match="--tokenizer"):
        check_tokenizer(dvae, manifest.tokenizer)


def test_predicted_pixels_take_the_place_of_masked_ones_only(tmp_path: Path, make_shards: MakeShards) -> None:
    samples = read_spread(LocalPlace(tmp_path), make_shards(tmp_path), 2)
    model = a_model("pixels")
    for sample, column in zip(samples, pixels_of(model, samples), strict=True):
        positions = masks().positions(0, sample.sample_id)
        patches, row = torch.from_numpy(sample.patches), torch.from_numpy(positions).long()
        with torch.no_grad():
            guesses = model.predict(patches[None], row[None])[0]
            (loss,) = model(patches[None], torch.from_numpy(sample.tokens)[None], row[None])
        expected = sample.patches.copy()
        values = (guesses * 0.5 + 0.5) * 255  # the mean and the deviation of MODEL
        expected[positions] = values.round().clamp(0, 255).to(torch.uint8).numpy()
        (picture,) = column.painted.values()
        assert np.abs(picture.astype(int) - unpatchify(expected, 8)).max() <= 1  # 127.5 rounds either way
        assert column.said == f"loss {loss.item() / 6:.3f}"


def pixels_of(model: MaskedImageModel, samples: list[Any]) -> list[Any]:
    assert isinstance(model.head, PixelsHead)
    return reconstruct(model, samples, masks(), pixel_painter(model.head))


@pytest.mark.parametrize("target", ["tokens", "pixels"])
def test_the_panel_is_drawn(tmp_path: Path, make_shards: MakeShards, target: str) -> None:
    manifest = make_shards(tmp_path)
    samples = read_spread(LocalPlace(tmp_path), manifest, 3)
    out = tmp_path / "pictures" / "panel.png"
    if target == "pixels":
        columns = pixels_of(a_model("pixels"), samples)
    else:
        columns = reconstruct(a_model(), samples, masks(), token_painter(a_tokenizer()))
    draw_panel(columns, out)
    pixels = imread(out)
    assert pixels.shape[0] > 500
    assert pixels[..., :3].std() > 0.05
