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

import torch
from torch import Tensor

from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.reading import validate
from beit_dist.errors import TokenizerError, UserError
from beit_dist.models.dvae import DVAE
from beit_dist.weights.safe_pickle.files import read_torch_file
from beit_dist.weights.safe_pickle.machine import Inert
from beit_dist.weights.tensor_files import check_names, parse_safetensors
from beit_dist.weights.tokenizer_files import save_tokenizer

PUBLISHED = DVAEConfig(vocabulary=8192, hidden=256, blocks_per_group=2, decoder_input=128)
"""Sizes of the published files: 53,786,240 and 43,829,766 parameters (openai/DALL-E, dall_e/encoder.py)."""

_CLASSES = {"dall_e.encoder": {"Encoder", "EncoderBlock"}, "dall_e.decoder": {"Decoder", "DecoderBlock"},
            "dall_e.utils": {"Conv2d"}, "torch.nn.modules.container": {"Sequential"},
            "torch.nn.modules.activation": {"ReLU"}, "torch.nn.modules.linear": {"Identity"},
            "torch.nn.modules.pooling": {"MaxPool2d"}, "torch.nn.modules.upsampling": {"Upsample"}}  # fmt: skip
_DEEPEST = 8
_STEM = re.compile(r"(.*?)blocks\.input\.w(?:eight)?")


def convert(encoder: str | Path, decoder: str | Path | None, out: str | Path, any_size: bool = False) -> DVAE:
    """Read the files and write the tokenizer ``out``; the sha256 of the files go into its notes.

    Args:
        decoder: None makes a tokenizer that has none: it makes tokens, but no pictures of them.
        any_size: do not insist on the published sizes.

    Raises:
        UserError: a file is missing, damaged, hostile, or of another architecture.
    """
    paths = {"encoder": encoder} | ({} if decoder is None else {"decoder": decoder})
    if any(Path(path).resolve() == Path(out).resolve() for path in paths.values()):
        raise TokenizerError(f"{out}: got one of the files to read, expected another file to write")
    parts = {part: read_weights(path) for part, path in paths.items()}
    config = _sizes(parts, paths)
    published = PUBLISHED if decoder is not None else PUBLISHED.model_copy(update={"decoder_input": 0})
    if config != published and not any_size:
        raise TokenizerError(
            f"{_named(paths)}: got sizes {config.model_dump()}, expected the published "
            f"{published.model_dump()}. Download the files again, or give --any-size if the sizes are meant to "
            "differ"
        )
    with torch.device("meta"):
        model = DVAE(config)
    tensors = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        path, tensor = paths[name.partition(".")[0]], tensors.get(name)
        got = None if tensor is None else tuple(tensor.shape)
        if tensor is None or got != expected.get(name):
            raise TokenizerError(f"{path}: {name}: got shape {got}, expected {expected.get(name)}")
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise TokenizerError(f"{path}: {name}: got values that are not all finite floating-point numbers")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    model.digest = save_tokenizer(out, model, config, {"source": {n: _sha256(p) for n, p in paths.items()}})
    return model


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
            f"{path}: got text, expected DALL-E's weights. `wget -o FILE` writes wget's log into FILE. "
            "Download with `curl -fLo FILE URL` or `wget -O FILE URL`"
        )
    found = _safetensors(path) if start[8:9] == b"{" else read_torch_file(path, admit=_admit)
    named = dict(_collect(found, set())) if isinstance(found, Inert) else _state(found)
    check_names(path, named)
    renamed = {_openai_name(name): tensor for name, tensor in named.items()}
    if not renamed or len(renamed) != len(named) or not all(name.startswith("blocks.") for name in renamed):
        raise TokenizerError(
            f"{path}: got something else, expected the weights of DALL-E's encoder or decoder (blocks.input.w ...)"
        )
    return renamed


def _admit(module: str, name: str) -> bool:
    return name in _CLASSES.get(module, ())


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return parse_safetensors(path.read_bytes())[0]
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path}: got damaged safetensors ({error})") from None


def _collect(shell: Inert, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors below a shell, as ``state_dict`` would have them. No module is in another twice."""
    state = shell.state
    if id(shell) in seen or prefix.count(".") > _DEEPEST or not isinstance(state, dict):
        raise TokenizerError(f"{prefix or 'the file'}: got something else, expected a module of DALL-E's")
    seen.add(id(shell))
    for kind in ("_parameters", "_modules"):
        members = state.get(kind) or {}
        if not isinstance(members, dict):
            raise TokenizerError(
                f"{prefix}{kind}: got {type(members).__name__}, expected names and tensors or modules"
            )
        for name, member in members.items():
            if not isinstance(name, str):
                raise TokenizerError(f"{prefix}{kind}: got a name that is not text")
            if isinstance(member, Tensor) and kind == "_parameters":
                yield f"{prefix}{name}", member
            elif isinstance(member, Inert) and kind == "_modules":
                yield from _collect(member, seen, f"{prefix}{name}.")


def _state(found: Any) -> dict[str, Tensor]:
    """The tensors of a plain state dict, alone or as ``state_dict``, or of the one such part of a larger model."""
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        return {}
    tensors = {n: value for n, value in found.items() if isinstance(n, str) and isinstance(value, Tensor)}
    stems = [found[1] for name in tensors if (found := _STEM.fullmatch(name))]
    start = stems[0] if len(stems) == 1 else ""  # "image_codebook." in a whole FLAVA model
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(f"{start}blocks.")}


def _openai_name(name: str) -> str:
    """FLAVA's ``blocks.group_1.group.block_1.res_path.path.conv_1.weight`` is ``...block_1.res_path.conv_1.w``."""
    name = name.replace(".group.", ".").replace(".path.", ".")
    return re.sub(r"\.(w|b)(eight|ias)$", r".\1", name)


def _sizes(parts: Mapping[str, Mapping[str, Tensor]], paths: Mapping[str, str | Path]) -> DVAEConfig:
    try:
        stem, head = parts["encoder"]["blocks.input.w"], parts["encoder"]["blocks.output.conv.w"]
        if stem.dim() != 4 or stem.shape[1:] != (3, 7, 7):
            raise ValueError("the first file's first convolution is not that of an encoder")
        block = re.compile(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
        blocks = [name for name in parts["encoder"] if block.fullmatch(name)]
        sizes = {
            "vocabulary": head.shape[0],
            "hidden": stem.shape[0],
            "blocks_per_group": len(blocks),
            "decoder_input": parts["decoder"]["blocks.input.w"].shape[0] if "decoder" in parts else 0,
        }
        return validate(DVAEConfig, sizes)
    except (KeyError, IndexError, ValueError, UserError) as error:
        raise TokenizerError(
            f"{_named(paths)}: got other files ({error}), expected OpenAI's encoder, then its decoder"
        ) from None


def _named(paths: Mapping[str, str | Path]) -> str:
    return ", ".join(map(str, paths.values()))


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
