"""DALL-E's published encoder and decoder to a tokenizer of ours, without running anything of their files.

OpenAI's ``encoder.pkl`` and ``decoder.pkl`` are whole pickled modules. They are read as data: the module classes
become inert shells, from which the tensors are collected. The same weights are also published as a plain state
dict (mmpretrain's ``dalle_encoder.pth``) and under other names (Hugging Face's ``FlavaImageCodebook``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from beit_dist.config import DVAEConfig, validate
from beit_dist.errors import TokenizerError, UserError
from beit_dist.safe_pickle.files import read_torch_file
from beit_dist.safe_pickle.machine import Inert
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.weights import save_tokenizer

PUBLISHED = DVAEConfig(vocabulary=8192, hidden=256, blocks_per_group=2, decoder_input=128)
"""Sizes of the published files: 53,786,240 and 43,829,766 parameters (openai/DALL-E, dall_e/encoder.py)."""

_CLASSES = {"dall_e.encoder": {"Encoder", "EncoderBlock"}, "dall_e.decoder": {"Decoder", "DecoderBlock"},
            "dall_e.utils": {"Conv2d"}, "torch.nn.modules.container": {"Sequential"},
            "torch.nn.modules.activation": {"ReLU"}, "torch.nn.modules.linear": {"Identity"},
            "torch.nn.modules.pooling": {"MaxPool2d"}, "torch.nn.modules.upsampling": {"Upsample"}}  # fmt: skip
_DEEPEST = 8


def convert(encoder: str | Path, decoder: str | Path, out: str | Path, any_size: bool = False) -> DVAE:
    """Read both files and write the tokenizer ``out``; the sha256 of the files go into its notes.

    Args:
        any_size: do not insist on the published sizes.

    Raises:
        UserError: a file is missing, damaged, hostile, or of another architecture.
    """
    parts = {"encoder": read_weights(encoder), "decoder": read_weights(decoder)}
    config = _sizes(parts, encoder, decoder)
    if config != PUBLISHED and not any_size:
        raise TokenizerError(
            f"{encoder}, {decoder}: got sizes {config.model_dump()}, expected the published "
            f"{PUBLISHED.model_dump()}. Download them again, or give --any-size if they are meant to differ"
        )
    with torch.device("meta"):
        model = DVAE(config)
    tensors = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != expected.get(name):
            path = _path_of(name, encoder, decoder)
            raise TokenizerError(f"{path}: {name}: got shape {got}, expected {expected.get(name)}")
        if not bool(tensors[name].isfinite().all()):
            raise TokenizerError(f"{_path_of(name, encoder, decoder)}: {name}: got values that are not finite")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    notes = {"source": {part: _sha256(path) for part, path in (("encoder", encoder), ("decoder", decoder))}}
    model.digest = save_tokenizer(out, model, config, notes)
    return model


def _path_of(name: str, encoder: str | Path, decoder: str | Path) -> str | Path:
    """The file that a tensor of the tokenizer came from."""
    return encoder if name.startswith("encoder.") else decoder


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one published file under OpenAI's names (``blocks.input.w``), whatever names it uses.

    Raises:
        UserError: the file cannot be read, would run code, or holds no such model.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}), expected DALL-E's weights") from None
    if re.match(rb"--\d{4}-|<|Will not", start):
        raise TokenizerError(
            f"{path}: got text, expected DALL-E's weights. `wget -o FILE` writes its log there; "
            "download with `curl -fLo FILE URL` or `wget -O FILE URL`"
        )
    found = _safetensors(path) if start[8:9] == b"{" else read_torch_file(path, admit=_admit)
    named = dict(_collect(found)) if isinstance(found, Inert) else _state(found)
    renamed = {_openai_name(name): tensor for name, tensor in named.items()}
    if not renamed or len(renamed) != len(named) or not all(name.startswith("blocks.") for name in renamed):
        raise TokenizerError(
            f"{path}: got no weights of DALL-E's encoder or decoder (names such as blocks.input.w)"
        )
    return renamed


def _admit(module: str, name: str) -> bool:
    return name in _CLASSES.get(module, ())


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, OSError) as error:
        raise TokenizerError(f"{path}: got damaged safetensors ({' '.join(str(error).split())})") from None


def _collect(shell: Inert, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors below a shell, as ``state_dict`` would have them. A cycle is ended by the depth."""
    state = shell.state
    if depth > _DEEPEST or not isinstance(state, dict):
        raise TokenizerError(f"{prefix or 'the file'}: got no module of DALL-E's")
    for kind in ("_parameters", "_modules"):
        members = state.get(kind) or {}
        if not isinstance(members, dict):
            raise TokenizerError(f"{prefix}{kind}: got {type(members).__name__}, expected names and what they are")
        for name, member in members.items():
            if isinstance(member, Tensor) and kind == "_parameters":
                yield f"{prefix}{name}", member
            elif isinstance(member, Inert) and kind == "_modules":
                yield from _collect(member, f"{prefix}{name}.", depth + 1)


def _state(found: Any) -> dict[str, Tensor]:
    """The tensors of a plain state dict, alone or as ``state_dict`` beside other things."""
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        return {}
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    codebook = {name: value for name, value in tensors.items() if name.startswith("image_codebook.")}
    return codebook or tensors  # a whole FLAVA model has the codebook beside much else


def _openai_name(name: str) -> str:
    """FLAVA's ``blocks.group_1.group.block_1.res_path.path.conv_1.weight`` is ``...block_1.res_path.conv_1.w``."""
    name = name.removeprefix("image_codebook.").replace(".group.", ".").replace(".path.", ".")
    return re.sub(r"\.(w|b)(eight|ias)$", r".\1", name)


def _sizes(parts: Mapping[str, Mapping[str, Tensor]], encoder: str | Path, decoder: str | Path) -> DVAEConfig:
    try:
        stem, head = parts["encoder"]["blocks.input.w"], parts["encoder"]["blocks.output.conv.w"]
        block = re.compile(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
        blocks = [name for name in parts["encoder"] if block.fullmatch(name)]
        sizes = {
            "vocabulary": head.shape[0],
            "hidden": stem.shape[0],
            "blocks_per_group": len(blocks),
            "decoder_input": parts["decoder"]["blocks.input.w"].shape[0],
        }
        return validate(DVAEConfig, sizes)
    except (KeyError, IndexError, UserError) as error:
        raise TokenizerError(
            f"{encoder}, {decoder}: got no encoder and decoder of one dVAE ({error}), expected OpenAI's pair"
        ) from None


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
