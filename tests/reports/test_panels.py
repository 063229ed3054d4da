"""The panel: samples as they lie in shards, masks of the run, tokens decoded back into pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from beit_dist.config import DVAEConfig, MaskingConfig, ModelConfig
from beit_dist.data.masking import MaskGenerator
from beit_dist.data.shards import Manifest
from beit_dist.data.storage import open_reader
from beit_dist.errors import ConfigError, SampleError, TokenizerError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.panels import check_fit, draw_panel, read_samples, reconstruct, unpatchify
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.weights import digests_of

MODEL = ModelConfig(width=16, depth=1, heads=2, image_size=32, patch_size=8, vocabulary=64)
MakeShards = Callable[..., Manifest]


def a_model() -> MaskedImageModel:
    model = MaskedImageModel(MODEL)
    model.initialise(0)
    return model


def a_tokenizer() -> DVAE:
    dvae = DVAE(DVAEConfig(vocabulary=64, hidden=8, blocks_per_group=1, decoder_input=8)).eval()
    dvae.digest = "0" * 64  # what the test's shards say made their tokens
    return dvae


def masks() -> MaskGenerator:
    return MaskGenerator(MODEL.grid, MaskingConfig(mode="exact", masked_patches=6, min_block=4), seed=0)


def test_unpatchify_puts_every_pixel_back() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    patches = np.stack(
        [image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(-1) for y in range(3) for x in range(3)]
    )
    assert np.array_equal(unpatchify(patches, 8), image)


def test_samples_are_spread_over_the_first_view(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path, shard_samples=[8, 8, 5], views=2)
    samples = read_samples(open_reader(str(tmp_path)), manifest, 3)
    assert [sample.sample_id for sample in samples] == [0, 7, 14]
    assert samples[0].patches.shape == (16, 192)
    assert samples[0].tokens.shape == (16,)
    assert len(read_samples(open_reader(str(tmp_path)), manifest, 100)) == 21


def test_a_damaged_sample_is_named(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    path = tmp_path / manifest.shards[0].name
    raw = bytearray(path.read_bytes())
    raw[manifest.layout.patches_start + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SampleError, match=r"v00/shard-000000\.tar, sample 0"):
        read_samples(open_reader(str(tmp_path)), manifest, 1)


def test_predictions_take_the_place_of_masked_tokens_only(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    samples = read_samples(open_reader(str(tmp_path)), manifest, 2)
    model, dvae = a_model(), a_tokenizer()
    decoded: list[torch.Tensor] = []
    decode = dvae.decode

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(tokens)
        return decode(tokens)

    dvae.decode = watched  # type: ignore[assignment]
    columns = reconstruct(model, dvae, samples, masks())

    truth, painted = (tokens.flatten(1) for tokens in decoded)
    for row, (sample, column) in enumerate(zip(samples, columns, strict=True)):
        positions = torch.from_numpy(masks().positions(0, sample.sample_id)).long()
        guesses = model.predict(torch.from_numpy(sample.patches)[None], positions[None])[0].argmax(-1)
        expected = torch.from_numpy(sample.tokens).long()
        assert torch.equal(truth[row], expected)
        right = int((guesses == expected[positions]).sum())
        expected[positions] = guesses
        assert torch.equal(painted[row], expected)
        assert (column.correct, column.count) == (right, 6)


def test_masked_patches_are_grey_and_others_untouched(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    sample = read_samples(open_reader(str(tmp_path)), manifest, 1)[0]
    column = reconstruct(a_model(), a_tokenizer(), [sample], masks())[0]
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
    check_fit(model, dvae, make_shards(tmp_path / "fits"))
    with pytest.raises(ConfigError, match="vocabulary"):
        check_fit(model, dvae, make_shards(tmp_path / "other", vocabulary=32))
    dvae.digest = "1" * 64
    with pytest.raises(TokenizerError, match="--tokenizer"):
        check_fit(model, dvae, make_shards(tmp_path / "again"))
    alone = DVAE(dvae.config.model_copy(update={"decoder_input": 0}))
    alone.digest = "0" * 64
    with pytest.raises(TokenizerError, match=r"without a decoder.*convert_dalle\.py encoder\.pkl decoder\.pkl"):
        check_fit(model, alone, make_shards(tmp_path / "undrawn"))


def test_shards_made_with_the_encoder_alone_are_drawn_by_the_whole_tokenizer(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    dvae = a_tokenizer()
    dvae.digest, without_decoder = digests_of(dvae)
    manifest = dataclasses.replace(make_shards(tmp_path), tokenizer=without_decoder)
    check_fit(a_model(), dvae, manifest)
    with torch.no_grad():
        dvae.encoder.blocks.input.b += 1
    with pytest.raises(TokenizerError, match="--tokenizer"):
        check_fit(a_model(), dvae, manifest)


def test_the_panel_is_drawn(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = make_shards(tmp_path)
    samples = read_samples(open_reader(str(tmp_path)), manifest, 3)
    out = tmp_path / "pictures" / "panel.png"
    draw_panel(reconstruct(a_model(), a_tokenizer(), samples, masks()), out)
    pixels = imread(out)
    assert pixels.shape[0] > 600
    assert pixels[..., :3].std() > 0.05
