"""Weights of a run as other projects read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from beit_dist.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from beit_dist.durable import write_whole
from beit_dist.engine.checkpoint.weights import StoredWeights
from beit_dist.engine.export import DTYPES, FILE, PICKLE, Exported, metadata_of
from beit_dist.errors import SpaceError
from beit_dist.models.vit import NORM_EPS
from beit_dist.models.weights import to_hf, to_timm, to_unilm

FORMS = ("hf", "timm", "unilm")


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
        path, content = folder / PICKLE, buffer.getvalue()
    else:
        path, content = folder / FILE, safetensors.torch.save(tensors, metadata_of(stored, dtype))
    try:
        for name, value in texts.items():
            write_whole(folder / name, (json.dumps(value, indent=2) + "\n").encode())
        write_whole(path, content)
    except OSError as error:
        raise SpaceError(f"--out: {path} could not be written: {error.strerror}") from None
    return Exported(path, len(tensors), len(content))


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
        # One that timm knows; where the model is another, the arguments say how.
        "architecture": "beit_large_patch16_224" if model.size == "large" else "beit_base_patch16_224",
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            "global_pool": "token",  # mean pooling would drop the last norm
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


def _unilm_args(model: ModelConfig) -> dict[str, Any]:
    """What the original keeps beside the weights, as far as it is known here.

    Plain values: its scripts never read them, and a namespace, as it has there, is refused by ``torch.load`` from
    2.6 on, which by default makes tensors and plain values only.
    """
    return {
        "model": f"beit_{model.size}_patch{model.patch_size}_{model.image_size}_8k_vocab",
        "input_size": model.image_size,
        "rel_pos_bias": model.relative_positions,
        "abs_pos_emb": model.absolute_positions,
        "layer_scale_init_value": model.layer_scale,
        "drop_path": model.drop_path,
        "imagenet_default_mean_and_std": (model.pixel_mean, model.pixel_std) == (IMAGENET_MEAN, IMAGENET_STD),
        "pixel_mean": list(model.pixel_mean),
        "pixel_std": list(model.pixel_std),
    }
