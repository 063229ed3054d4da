"""DALL-E's published files become a tokenizer, to the last bit, and hostile ones run nothing.

The files are written by OpenAI's own package, with its classes, and compared with what its classes compute.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from beit_dist.commands import convert as command
from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.reading import validate
from beit_dist.errors import ConfigError, TokenizerError, UserError
from beit_dist.models.dvae import DVAE
from beit_dist.weights import dalle
from beit_dist.weights.dalle import convert, read_weights
from beit_dist.weights.tokenizer_files import digests_of, load_tokenizer, tokenizer_digests, tokenizer_extra

SMALL = DVAEConfig(vocabulary=512, hidden=64, blocks_per_group=1, decoder_input=16)
"""The smallest that OpenAI's classes allow, but for the decoder's input."""
OLD_AND_NEW = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")


@pytest.fixture
def openai(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """OpenAI's encoder and decoder, with random values in every tensor."""
    # The package imports requests, to download with.
    if importlib.util.find_spec("requests") is None:
        monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))
    package: Any = pytest.importorskip("dall_e", reason="pip install --no-deps DALL-E")
    sizes = {"n_hid": SMALL.hidden, "n_blk_per_group": SMALL.blocks_per_group, "vocab_size": SMALL.vocabulary}
    encoder, decoder = package.Encoder(**sizes), package.Decoder(n_init=SMALL.decoder_input, **sizes)
    generator = torch.Generator().manual_seed(3)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        # Residual paths that are not drowned by the main path, and biases that are not zero.
        spread = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(0, spread, generator=generator)
    with torch.no_grad():  # centred logits, else the same few tokens would win everywhere
        encoder.blocks.output.conv.b -= encoder(0.8 * (some_images(8).float() / 255) + 0.1).mean((0, 2, 3))
    return encoder, decoder


@pytest.fixture
def written(tmp_path: Path, openai: tuple[Any, Any]) -> tuple[Path, Path]:
    """encoder.pkl and decoder.pkl."""
    paths = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    for model, path in zip(openai, paths, strict=True):
        torch.save(model, path)
    return paths


def some_images(count: int, side: int = 64) -> Tensor:
    """Smooth ones: of noise alone all tokens would be alike."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return (nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@OLD_AND_NEW
def test_openais_pickled_modules_are_converted_to_the_last_bit(
    tmp_path: Path, openai: tuple[Any, Any], zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out = (tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"), tmp_path / "t.safetensors"
    for model, path in zip(openai, paths, strict=True):
        torch.save(model, path, _use_new_zipfile_serialization=zipped)
    convert(*paths, out, any_size=True)
    found = load_tokenizer(out)
    assert found.config == SMALL
    assert same(found.encoder.state_dict(), openai[0].state_dict())
    assert found.decoder is not None
    assert same(found.decoder.state_dict(), openai[1].state_dict())
    assert {len(digest) for digest in tokenizer_extra(out)["source"].values()} == {64}

    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"expected the published .*8192.*--any-size"):
        convert(*paths, other)
    with pytest.raises(UserError, match=r"expected the published .*8192.*'decoder_input': 0"):
        convert(paths[0], None, other)
    for swapped in ((paths[1], paths[0]), (paths[1], None)):
        with pytest.raises(UserError, match=r"decoder\.pkl.*first convolution is not that of an encoder"):
            convert(*swapped, other, any_size=True)
    assert not other.exists()
    monkeypatch.setattr(dalle, "PUBLISHED", SMALL)
    assert convert(*paths, other).digest == found.digest


def test_outputs_equal_openais_in_fp32(
    openai: tuple[Any, Any], written: tuple[Path, Path], tmp_path: Path
) -> None:
    from dall_e import map_pixels, unmap_pixels

    ours, images = convert(*written, tmp_path / "t", any_size=True), some_images(4)
    with torch.no_grad():
        mapped = map_pixels(images.float() / 255)
        logits = openai[0](mapped)
        torch.testing.assert_close(ours.encoder(mapped), logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
        tokens = logits.argmax(1)
        assert len(tokens.unique()) > 100
        assert torch.equal(ours.tokens(images), tokens)
        one_hot = nn.functional.one_hot(tokens, SMALL.vocabulary).permute(0, 3, 1, 2).float()
        drawn = unmap_pixels(torch.sigmoid(openai[1](one_hot).float()[:, :3]))
    assert drawn.std() > 0.05
    torch.testing.assert_close(ours.decode(tokens), drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_over_99_in_100_tokens_are_openais_in_low_precision(
    openai: tuple[Any, Any], written: tuple[Path, Path], tmp_path: Path, precision: Any
) -> None:
    ours, images = convert(*written, tmp_path / "t", any_size=True), some_images(24)
    with torch.no_grad():
        expected = openai[0](0.8 * (images.float() / 255) + 0.1).argmax(1)
    agreement = (ours.tokens(images, precision) == expected).float().mean()
    assert agreement > 0.99


# The encoder alone


def test_the_encoder_alone_makes_the_same_tokens_and_no_pictures(
    tmp_path: Path, written: tuple[Path, Path], capsys: Any
) -> None:
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "alone.safetensors"
    assert command.main([*map(str, written), "--out", str(whole), "--any-size"]) == 0
    assert command.main([str(written[0]), "--out", str(alone), "--any-size"]) == 0
    said = capsys.readouterr().out
    assert "whole.safetensors: encoder and decoder, 512 tokens" in said
    assert "alone.safetensors: encoder alone, 512 tokens" in said
    both, one = load_tokenizer(whole), load_tokenizer(alone)
    images = some_images(2)
    tokens = one.tokens(images)
    assert torch.equal(tokens, both.tokens(images))
    with pytest.raises(TokenizerError, match=r"got one without a decoder, .*encoder\.pkl decoder\.pkl"):
        one.decode(tokens)
    assert set(tokenizer_extra(alone)["source"]) == {"encoder"}

    # Shards made with the encoder alone are drawn, and trained on, with the whole tokenizer too.
    assert digests_of(both) == tokenizer_digests(whole) == (both.digest, one.digest)
    assert digests_of(one) == tokenizer_digests(alone) == (one.digest,)


def test_a_tokenizer_is_not_trained_without_a_decoder() -> None:
    from beit_dist.config.tokenizer import TokenizerConfig

    with pytest.raises(ConfigError, match=r"model\.decoder_input: got 0, expected 1 or more"):
        validate(TokenizerConfig, {"run": "r", "model": {"decoder_input": 0}})


# Other names


def test_hugging_faces_codebook_is_read_and_computes_the_same(
    tmp_path: Path, openai: tuple[Any, Any], written: tuple[Path, Path]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    settings = transformers.FlavaImageCodebookConfig(
        hidden_size=SMALL.hidden, num_blocks_per_group=SMALL.blocks_per_group, vocab_size=SMALL.vocabulary
    )
    codebook = transformers.FlavaImageCodebook(settings)
    renamed = {flava_name(name): tensor for name, tensor in openai[0].state_dict().items()}
    codebook.load_state_dict(renamed, strict=True)
    codebook.save_pretrained(tmp_path / "flava")
    torch.save(codebook.state_dict(), tmp_path / "pytorch_model.bin")
    whole = {f"image_codebook.{name}": tensor for name, tensor in codebook.state_dict().items()}
    safetensors.torch.save_file(whole | {"flava.logit_scale": torch.ones(1)}, tmp_path / "whole.safetensors")
    for path in ("flava/model.safetensors", "pytorch_model.bin", "whole.safetensors"):
        assert same(read_weights(tmp_path / path), openai[0].state_dict()), path

    ours = convert(tmp_path / "flava/model.safetensors", None, tmp_path / "t", any_size=True)
    images = some_images(2)
    with torch.no_grad():
        assert torch.equal(ours.tokens(images), codebook.get_codebook_indices(0.8 * (images.float() / 255) + 0.1))


def flava_name(name: str) -> str:
    for group in range(1, 5):
        name = name.replace(f"group_{group}.", f"group_{group}.group.")
    name = name.replace("res_path.", "res_path.path.")
    return name[:-2] + {".w": ".weight", ".b": ".bias"}[name[-2:]]


@pytest.mark.parametrize("style", ["plain", "nested", "prefixed"])
def test_mmpretrains_state_dict_is_read(tmp_path: Path, openai: tuple[Any, Any], style: str) -> None:
    expected = openai[0].state_dict()
    saved: Any = dict(expected)
    if style == "nested":
        saved = {"state_dict": saved, "meta": {"epoch": 1}}
    if style == "prefixed":
        saved = {"state_dict": {f"target_generator.{n}": t for n, t in saved.items()} | {"head.w": torch.ones(1)}}
    torch.save(saved, tmp_path / "dalle_encoder.pth")
    assert same(read_weights(tmp_path / "dalle_encoder.pth"), expected)


# Files that are refused


class Runs:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def in_an_attribute(encoder: Any, evil: Runs) -> Any:
    encoder.blocks.group_2.block_1.res_path.conv_3.device = evil
    return encoder


def in_place_of_a_module(encoder: Any, evil: Runs) -> Any:
    encoder.blocks.group_1._modules["pool"] = evil
    return encoder


def in_place_of_a_tensor(encoder: Any, evil: Runs) -> Any:
    encoder.blocks.input._parameters["w"] = evil
    return encoder


def as_a_hook(encoder: Any, evil: Runs) -> Any:
    encoder._forward_hooks[0] = evil
    return encoder


def beside_it(encoder: Any, evil: Runs) -> Any:
    return {"state_dict": encoder.state_dict(), "note": evil}


def instead_of_it(_: Any, evil: Runs) -> Any:
    return evil


@OLD_AND_NEW
@pytest.mark.parametrize(
    "hide", [in_an_attribute, in_place_of_a_module, in_place_of_a_tensor, as_a_hook, beside_it, instead_of_it]
)
def test_a_hostile_variant_is_refused_and_runs_nothing(
    tmp_path: Path, openai: tuple[Any, Any], zipped: bool, hide: Callable[[Any, Runs], Any]
) -> None:
    path, marker = tmp_path / "encoder.pkl", tmp_path / "ran"
    torch.save(hide(openai[0], Runs(marker)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"encoder\.pkl: it asks for .*nothing of it was run"):
        convert(path, None, tmp_path / "t", any_size=True)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file is harmless, so the test shows nothing"


def test_a_module_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "e.pkl")
    with pytest.raises(UserError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        read_weights(tmp_path / "e.pkl")


def test_a_module_inside_itself_ends(tmp_path: Path) -> None:
    shell = nn.Sequential(nn.ReLU())
    shell._modules["again"] = shell
    torch.save(shell, tmp_path / "e.pkl")
    with pytest.raises(UserError, match="expected a module of DALL-E's"):
        read_weights(tmp_path / "e.pkl")


def test_the_log_of_wget_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "e.pkl").write_text("--2026-01-01 10:00:00--  https://example.org/encoder.pkl\n")
    with pytest.raises(UserError, match=r"wget -o FILE. writes wget's log"):
        read_weights(tmp_path / "e.pkl")


def test_no_file_is_written_over_the_one_that_is_read(tmp_path: Path) -> None:
    state = DVAE(DVAEConfig(vocabulary=24, hidden=8, blocks_per_group=1, decoder_input=6)).encoder.state_dict()
    torch.save(state, tmp_path / "e.pth")
    (tmp_path / "link").symlink_to("e.pth")
    content = (tmp_path / "e.pth").read_bytes()
    with pytest.raises(TokenizerError, match=r"link: got one of the files to read"):
        convert(tmp_path / "e.pth", None, tmp_path / "link", any_size=True)
    assert (tmp_path / "e.pth").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.input.b": torch.zeros(9)}, r"encoder\.blocks\.input\.b: got shape \(9,\), expected \(8,\)"),
        ({"blocks.input.b": torch.full((8,), torch.nan)}, r"blocks\.input\.b: got values that are not all finite"),
        (
            {"blocks.input.b": torch.full((8,), 1e300, dtype=torch.float64)},
            r"b: got values that are not all finite",
        ),
        (
            {"blocks.input.b": torch.ones(8, dtype=torch.int64)},
            r"blocks\.input\.b: got values that are not all finite",
        ),
        ({"blocks.group_5.block_1.id_path.b": torch.ones(8)}, r"group_5.*: got shape \(8,\), expected None"),
        ({"blocks.input.b": None}, r"blocks\.input\.b: got shape None, expected \(8,\)"),
    ],
)
def test_wrong_shapes_and_values_are_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = DVAEConfig(vocabulary=24, hidden=8, blocks_per_group=1, decoder_input=6)
    state = DVAE(config, seed=3).encoder.state_dict() | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "e.pth")
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "e.pth", None, tmp_path / "t", any_size=True)
    assert not (tmp_path / "t").exists()
