"""Weights of a run as other projects read them, and theirs for a new run. No file is unpickled."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from beit_dist.config import HALF, IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from beit_dist.durable import write_whole
from beit_dist.engine.checkpoint.weights import StoredWeights
from beit_dist.engine.export import DTYPES, FILE, Exported, metadata_of
from beit_dist.errors import SpaceError, WeightsError
from beit_dist.models.vit import NORM_EPS
from beit_dist.models.weights import from_hf, from_unilm, to_hf, to_timm, to_unilm
from beit_dist.safe_pickle.files import read_torch_file
from beit_dist.safe_pickle.machine import Inert
from beit_dist.storage.place import is_url

FORMS = ("hf", "timm", "unilm")
_PICKLED = (".pth", ".pt", ".bin")
_TIMM_NAMES = {"tiny": "beit_tiny", "small": "beit_small", "base": "beit_base", "large": "beit_large"}


def export_elsewhere(stored: StoredWeights, out: str | Path, form: str, dtype: str = "fp32") -> Exported:
    """Write the weights in the folder ``out`` as another project reads them; its files are replaced if they exist.

    ``hf``: config.json, model.safetensors and preprocessor_config.json, for ``BeitForMaskedImageModeling``.
    ``timm``: config.json and model.safetensors, for ``Beit`` without a classifier. ``unilm``: model.pth, which
    the original's scripts load. Memory is needed for the model. The file of weights is written last.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SpaceError: the disk is full, or cannot be written to.
    """
    model, folder = stored.config.model, Path(out)
    weights = {name: stored.read(name) for name in stored.shapes}
    convert = {"hf": to_hf, "timm": to_timm, "unilm": to_unilm}[form]
    kind = DTYPES[dtype][1]
    tensors = {
        name: (tensor.to(kind) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in convert(weights, model).items()
    }
    texts: dict[str, Any] = {}
    if form == "hf":
        texts = {"config.json": _hf_config(model, dtype), "preprocessor_config.json": _hf_processor(model)}
    elif form == "timm":
        texts = {"config.json": _timm_config(model)}
    if form == "unilm":
        buffer = io.BytesIO()
        torch.save({"model": tensors, "epoch": 0, "args": _unilm_args(model)}, buffer)
        path, content = folder / "model.pth", buffer.getvalue()
    else:
        path, content = folder / FILE, safetensors.torch.save(tensors, metadata_of(stored, dtype))
    try:
        for name, value in texts.items():
            write_whole(folder / name, (json.dumps(value, indent=2) + "\n").encode())
        write_whole(path, content)
    except OSError as error:
        raise SpaceError(f"--out: {path} could not be written: {error.strerror}") from None
    return Exported(path, len(tensors), len(content))


@dataclass(frozen=True)
class Foreign:
    """Weights that another project's file holds, as those of our model.

    Attributes:
        weights: by our names, fp32.
        known: what the file says of settings that shapes do not show: heads, pixel_mean, pixel_std.
        digest: sha256 of the file.
    """

    weights: dict[str, Tensor]
    known: dict[str, Any]
    digest: str


def is_foreign(source: str) -> bool:
    """Whether ``source`` is a file of weights, or a folder as Hugging Face and timm write them, and not a run."""
    path = Path(source)
    if is_url(source):
        return path.suffix in (*_PICKLED, ".safetensors")
    return path.suffix in (*_PICKLED, ".safetensors") or (path / "config.json").is_file()


def read_foreign(source: str | Path, model: ModelConfig) -> Foreign:
    """Read weights of Hugging Face, timm or unilm for ``model``; other resolutions are resampled.

    Raises:
        WeightsError: there is no such file, it is damaged or would run code, or holds no BEiT v1 model.
    """
    if is_url(str(source)):
        raise WeightsError(f"{source}: got a URL, expected a local file or folder. Copy it here first")
    path, known = Path(source), {}
    if path.is_dir():
        known = _settings(path)
        files = [path / name for name in (FILE, "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise WeightsError(f"{path}: got no {FILE}, expected it beside config.json")
        path = files[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".safetensors":
        try:
            tensors = safetensors.torch.load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise WeightsError(f"{path}: got no whole safetensors file ({error})") from None
    else:
        found = read_torch_file(path)
        if isinstance(found, dict) and isinstance(found.get("args"), Inert):
            known = _unilm_known(found["args"].state)
        tensors = _state(path, found)
    try:
        if any(name.startswith("beit.") for name in tensors):
            tensors = from_hf(tensors, model)
        weights = from_unilm(tensors, model)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return Foreign(weights, known, hashlib.sha256(content).hexdigest())


def _state(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict in what a file held: under ``model``, ``module`` or ``state_dict``, or by itself."""
    for key in ("model", "module", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{path}: got no state of a model, expected tensors by name")
    return {str(name).removeprefix("backbone."): tensor for name, tensor in found.items()}


def _settings(folder: Path) -> dict[str, Any]:
    """Heads and normalisation from a folder of Hugging Face or timm."""
    known: dict[str, Any] = {}
    try:
        config = json.loads((folder / "config.json").read_bytes())
        processor = folder / "preprocessor_config.json"
        look = json.loads(processor.read_bytes()) if processor.is_file() else {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: its config.json or preprocessor_config.json is no JSON ({error})") from None
    timm = config.get("pretrained_cfg", {})
    if "num_attention_heads" in config:
        known["heads"] = config["num_attention_heads"]
    for name, value in (
        ("pixel_mean", look.get("image_mean", timm.get("mean"))),
        ("pixel_std", look.get("image_std", timm.get("std"))),
    ):
        if value is not None:
            known[name] = tuple(value)
    return known


def _unilm_known(state: Any) -> dict[str, Any]:
    """unilm's normalisation is one flag; ours writes the numbers beside it."""
    state = state if isinstance(state, dict) else {}
    if "pixel_mean" in state and "pixel_std" in state:
        return {"pixel_mean": tuple(state["pixel_mean"]), "pixel_std": tuple(state["pixel_std"])}
    if "imagenet_default_mean_and_std" not in state:
        return {}
    imagenet = bool(state["imagenet_default_mean_and_std"])
    return {"pixel_mean": IMAGENET_MEAN if imagenet else HALF, "pixel_std": IMAGENET_STD if imagenet else HALF}


def _hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["BeitForMaskedImageModeling"],
        "model_type": "beit",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "vocab_size": model.vocabulary,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "layer_norm_eps": NORM_EPS,  # Hugging Face's default is another
        "use_mask_token": True,
        "use_absolute_position_embeddings": model.absolute_positions,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": model.relative_positions,
        "layer_scale_init_value": model.layer_scale,
        "drop_path_rate": model.drop_path,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_mean_pooling": True,  # else the model would have a second norm before the one of the head
    }


def _hf_processor(model: ModelConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": model.image_size, "width": model.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.pixel_mean),
        "image_std": list(model.pixel_std),
    }


def _timm_config(model: ModelConfig) -> dict[str, Any]:
    size = model.image_size
    return {
        "architecture": f"{_TIMM_NAMES[model.size]}_patch{model.patch_size}_{size}",
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "init_values": model.layer_scale or None,
            "use_abs_pos_emb": model.absolute_positions,
            "use_rel_pos_bias": model.relative_positions,
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": list(model.pixel_mean),
            "std": list(model.pixel_std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _unilm_args(model: ModelConfig) -> argparse.Namespace:
    """What the original keeps beside the weights, as far as it is known here."""
    return argparse.Namespace(
        model=f"beit_{model.size}_patch{model.patch_size}_{model.image_size}_8k_vocab",
        input_size=model.image_size,
        rel_pos_bias=model.relative_positions,
        abs_pos_emb=model.absolute_positions,
        layer_scale_init_value=model.layer_scale,
        drop_path=model.drop_path,
        imagenet_default_mean_and_std=(model.pixel_mean, model.pixel_std) == (IMAGENET_MEAN, IMAGENET_STD),
        pixel_mean=list(model.pixel_mean),
        pixel_std=list(model.pixel_std),
    )
