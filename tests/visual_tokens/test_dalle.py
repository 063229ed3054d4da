"""DALL-E's published files become a tokenizer, to the last bit, and hostile ones run nothing.

Stand-ins carry the module and class names that OpenAI's package has in its pickles.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit_dist.config import DVAEConfig
from beit_dist.errors import UserError
from beit_dist.visual_tokens.dalle import convert, read_weights
from beit_dist.visual_tokens.dvae import DVAE, Block, Conv, Decoder, Encoder
from beit_dist.visual_tokens.weights import load_tokenizer, tokenizer_extra

TINY = DVAEConfig(vocabulary=24, hidden=8, blocks_per_group=2, decoder_input=6)


@pytest.fixture
def model() -> DVAE:
    """Random values in every tensor, biases too."""
    made = DVAE(TINY, seed=3)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return made.requires_grad_(False)


@pytest.fixture
def as_openai(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our classes are pickled under OpenAI's names."""
    before: list[tuple[type, str, str]] = []
    for module, kinds in {
        "dall_e.encoder": {"Encoder": Encoder, "EncoderBlock": Block},
        "dall_e.decoder": {"Decoder": Decoder},
        "dall_e.utils": {"Conv2d": Conv},
    }.items():
        fake: Any = types.ModuleType(module)
        for name, kind in kinds.items():
            setattr(fake, name, kind)
            before.append((kind, kind.__module__, kind.__qualname__))
            kind.__module__, kind.__qualname__ = module, name
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    yield
    for kind, module, name in before:  # monkeypatch would delete what is no entry of the class's dict
        kind.__module__, kind.__qualname__ = module, name


def same(one: DVAE, other: DVAE) -> bool:
    expected = other.state_dict()
    found = one.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whole_pickled_modules_are_converted_to_the_last_bit(
    tmp_path: Path, model: DVAE, as_openai: None, zipped: bool
) -> None:
    encoder, decoder, out = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", tmp_path / "t.safetensors"
    torch.save(model.encoder, encoder, _use_new_zipfile_serialization=zipped)
    torch.save(model.decoder, decoder, _use_new_zipfile_serialization=zipped)
    convert(encoder, decoder, out, any_size=True)
    assert same(load_tokenizer(out), model)
    assert {len(digest) for digest in tokenizer_extra(out)["source"].values()} == {64}
    with pytest.raises(UserError, match=r"expected the published .*8192.*--any-size"):
        convert(encoder, decoder, tmp_path / "other")
    with pytest.raises(UserError, match="expected OpenAI's pair"):
        convert(decoder, encoder, tmp_path / "other", any_size=True)
    assert not (tmp_path / "other").exists()


def flava_name(name: str) -> str:
    for group in range(1, 5):
        name = name.replace(f"group_{group}.", f"group_{group}.group.")
    name = name.replace("res_path.", "res_path.path.")
    return name[:-2] + {".w": ".weight", ".b": ".bias"}[name[-2:]]


@pytest.mark.parametrize("style", ["mmpretrain", "nested", "flava", "whole flava"])
def test_state_dicts_are_read_under_other_names(tmp_path: Path, model: DVAE, style: str) -> None:
    expected = model.encoder.state_dict()
    saved: Any = dict(expected)
    if "flava" in style:
        saved = {flava_name(name): tensor for name, tensor in saved.items()}
    if style == "whole flava":
        saved = {f"image_codebook.{name}": t for name, t in saved.items()} | {"text.weight": torch.ones(1)}
    torch.save({"state_dict": saved, "epoch": 1} if style == "nested" else saved, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Hostile:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_module_is_refused_and_runs_nothing(tmp_path: Path, model: DVAE, zipped: bool) -> None:
    shell = nn.Sequential(nn.ReLU())
    shell.blocks = Hostile()  # type: ignore[assignment]
    torch.save(shell, tmp_path / "e.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="nothing of it was run"):
        read_weights(tmp_path / "e.pkl")


def test_a_module_inside_itself_ends(tmp_path: Path) -> None:
    shell = nn.Sequential(nn.ReLU())
    shell._modules["again"] = shell
    torch.save(shell, tmp_path / "e.pkl")
    with pytest.raises(UserError, match="got no module of DALL-E's"):
        read_weights(tmp_path / "e.pkl")


def test_the_log_of_wget_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "e.pkl").write_text("--2026-01-01 10:00:00--  https://example.org/encoder.pkl\n")
    with pytest.raises(UserError, match=r"wget -o FILE. writes its log"):
        read_weights(tmp_path / "e.pkl")


def test_wrong_shapes_and_values_are_refused_by_name(tmp_path: Path, model: DVAE) -> None:
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    torch.save(decoder, tmp_path / "d.pth")
    torch.save(encoder | {"blocks.input.b": torch.zeros(9)}, tmp_path / "e.pth")
    with pytest.raises(UserError, match=r"encoder\.blocks\.input\.b: got shape \(9,\), expected \(8,\)"):
        convert(tmp_path / "e.pth", tmp_path / "d.pth", tmp_path / "t", any_size=True)
    torch.save(encoder | {"blocks.input.b": torch.full((8,), torch.nan)}, tmp_path / "e.pth")
    with pytest.raises(UserError, match="not finite"):
        convert(tmp_path / "e.pth", tmp_path / "d.pth", tmp_path / "t", any_size=True)
