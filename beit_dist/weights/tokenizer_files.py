"""The tokenizer's file: safetensors with the configuration and a digest. Reading one runs nobody's code.

The digest is the sha256 of the configuration and of every tensor's name, type, shape and bytes. It is the
tokenizer's identity: manifests of shards and checkpoints record it. What else is known of the training
(``extra``) is kept beside it and does not change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from beit_dist.config.dvae import DVAEConfig
from beit_dist.config.reading import validate
from beit_dist.errors import TokenizerError, UserError
from beit_dist.models.dvae import DVAE
from beit_dist.storage.durable import check_takes_files, write_whole
from beit_dist.weights.tensor_files import parse_safetensors

FORMAT = "beit_dist.tokenizer"
"""The file's one metadata entry. One, because safetensors writes several in an order of its own."""
FORMAT_VERSION = 1

_WAY_OUT = "Train one with beit tokenizer, or copy the file again."


def beside(tokenizer: Path, ending: str) -> Path:
    """The path beside a tokenizer's file that ends with ``ending``, in place of ``.safetensors`` if it has that.

    What else follows a dot is part of the name: ``dvae-kl0.1`` and ``dvae-kl0.5`` share nothing.
    """
    return tokenizer.parent / (tokenizer.name.removesuffix(".safetensors") + ending)


def save_tokenizer(
    path: str | Path, model: DVAE, config: DVAEConfig, extra: Mapping[str, Any] | None = None
) -> str:
    """Write the tokenizer to ``path``, whole or not at all, and return its digest.

    Args:
        extra: JSON values about the training (steps, measurements, versions); informational.

    Raises:
        TokenizerError: the file cannot be written.
    """
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in model.state_dict().items()}
    digest = _digest(config, tensors)
    about = _canonical(dict(extra or {}))
    metadata = {
        "version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "digest": digest,
        "extra": about,
        "seal": _seal(digest, about),
    }
    raw = safetensors.torch.save(tensors, {FORMAT: _canonical(metadata)})
    _write(Path(path), raw)
    return digest


def load_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> DVAE:
    """Read and verify a tokenizer; its digest is the model's ``digest``. Parameters are fp32 and frozen.

    Raises:
        TokenizerError: the file is missing, truncated, altered, or not a tokenizer of this format.
    """
    metadata, tensors = _read(Path(path))
    config = _config(path, metadata)
    with torch.device("meta"):
        model = DVAE(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise _error(path, f"{name} of shape {got.get(name)}", f"shape {expected.get(name)}")
    model.load_state_dict(tensors, assign=True)
    model.digest = metadata["digest"]
    return model.requires_grad_(False).eval().to(device)


def tokenizer_digest(path: str | Path) -> str:
    """The digest of the tokenizer at ``path``, verified against its bytes.

    Raises:
        TokenizerError: as :func:`load_tokenizer`.
    """
    return str(_read(Path(path))[0]["digest"])


def tokenizer_digests(path: str | Path) -> tuple[str, ...]:
    """What :func:`digests_of` says of the tokenizer at ``path``, verified against its bytes.

    Raises:
        TokenizerError: as :func:`load_tokenizer`.
    """
    metadata, tensors = _read(Path(path))
    return metadata["digest"], *_encoder_digest(_config(path, metadata), tensors)


def digests_of(model: DVAE) -> tuple[str, ...]:
    """Its digest, and the one it would have without its decoder: shards of either were made by this encoder."""
    return model.digest, *_encoder_digest(model.config, model.state_dict())


def _encoder_digest(config: DVAEConfig, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    if not config.decoder_input:
        return ()
    encoder = {name: tensor.cpu() for name, tensor in tensors.items() if name.startswith("encoder.")}
    return (_digest(config.model_copy(update={"decoder_input": 0}), encoder),)


def tokenizer_extra(path: str | Path) -> dict[str, Any]:
    """The notes about the training that are stored beside the weights.

    Raises:
        TokenizerError: as :func:`load_tokenizer`.
    """
    return dict(json.loads(_read(Path(path))[0]["extra"]))


def check_writable(path: str | Path) -> None:
    """Refuse an output path that cannot be written, before hours of work instead of after.

    Raises:
        TokenizerError: the folder is missing and cannot be made, or takes no new file.
    """
    path = Path(path)
    if path.is_dir():
        raise TokenizerError(f"{path}: got a folder, expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_takes_files(path.parent)
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be written ({error.strerror}). Choose another --out, or make its folder writable"
        ) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, verified. The bytes are read, not mapped: a later truncation cannot crash us."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _error(path, "no file", "a tokenizer (.safetensors)") from None
    except OSError as error:
        raise _error(path, f"{error.strerror}", "a readable file") from None
    try:
        tensors, entries = parse_safetensors(raw)
    except ValueError as error:
        raise _error(path, f"{len(raw)} bytes that are not safetensors ({error})", "a whole tokenizer") from None
    metadata = _metadata(path, entries)
    digest = _digest(_config(path, metadata), tensors)
    if digest != metadata["digest"]:
        raise _error(path, f"content of digest {digest}", f"digest {metadata['digest']}: the file was altered")
    if _seal(digest, metadata["extra"]) != metadata["seal"]:
        raise _error(
            path, "notes that do not match their seal", "the notes as they were written: the file was altered"
        )
    return metadata, tensors


def _metadata(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    text = entries.get(FORMAT)
    if text is None:
        raise _error(path, "a safetensors file of something else", f"the metadata entry {FORMAT!r}")
    try:
        metadata = json.loads(text)
        version, named = metadata["version"], {"config": dict, "digest": str, "extra": str, "seal": str}
        broken = [name for name, kind in named.items() if not isinstance(metadata[name], kind)]
    except (ValueError, KeyError, TypeError):
        raise _error(path, "unreadable metadata", "version, config, digest, extra and seal") from None
    if version != FORMAT_VERSION:
        raise _error(path, f"format version {version!r}", f"version {FORMAT_VERSION}")
    if broken:
        raise _error(path, f"metadata with a wrong {broken[0]}", "config, digest, extra and seal")
    return dict(metadata)


def _config(path: str | Path, metadata: Mapping[str, Any]) -> DVAEConfig:
    try:
        return validate(DVAEConfig, metadata["config"])
    except UserError as error:
        raise TokenizerError(f"{path}: its configuration is wrong: {error}") from None


def _digest(config: DVAEConfig, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(_canonical(config.model_dump(mode="json")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _seal(digest: str, extra: str) -> str:
    return hashlib.sha256(f"{digest}\n{extra}".encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _write(path: Path, raw: bytes) -> None:
    try:
        write_whole(path, raw)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be written ({error.strerror})") from None


def _error(path: str | Path, got: str, expected: str) -> TokenizerError:
    return TokenizerError(f"{path}: got {got}, expected {expected}. {_WAY_OUT}")
