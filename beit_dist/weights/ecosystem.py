"""Weights of a run as other projects read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from beit_dist.errors import ConfigError, SpaceError
from beit_dist.models.heads.targets import head_of
from beit_dist.storage.durable import write_whole
from beit_dist.weights.export import DTYPES, FILE, PICKLE, Exported, metadata_of
from beit_dist.weights.names import to_hf, to_timm, to_unilm
from beit_dist.weights.stored import StoredWeights
from beit_dist.weights.their_settings import hf_config, hf_processor, timm_config, unilm_args

_BACKBONES = ("timm",)
"""Forms without a head over patches: any is left out."""
_NO_SEGMENTATION = {
    "hf": "its BeitForSemanticSegmentation counts out_indices one too low and refuses the one behind the last, so "
    "it cannot see the output of the last block, which this model uses",
    "timm": "timm has no models for segmentation",
    "unilm": "the original trains segmentation in another project, mmsegmentation, whose files are not written",
}
_CLASSES = {
    ("hf", "pretraining"): "BeitForMaskedImageModeling of Hugging Face",
    ("hf", "classification"): "BeitForImageClassification of Hugging Face",
    ("timm", "pretraining"): "Beit of timm without a classifier",
    ("timm", "classification"): "Beit of timm",
    ("unilm", "pretraining"): "unilm's model for pre-training",
    ("unilm", "classification"): "unilm's model for fine-tuning",
}


def export_elsewhere(stored: StoredWeights, out: str | Path, form: str, dtype: str = "fp32") -> Exported:
    """Write the weights in the folder ``out`` as another project reads them; its files are replaced if they exist.

    ``hf``: config.json, model.safetensors and preprocessor_config.json, for ``BeitForMaskedImageModeling`` or
    ``BeitForImageClassification``. ``timm``: config.json and model.safetensors, for ``Beit``, without a classifier
    if the run is of pre-training. ``unilm``: model.pth, which the original's scripts load. Memory is needed for
    the model. The file of weights is written last.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the form has no place for the model's head.
        SpaceError: the disk is full, or cannot be written to.
    """
    folder = Path(out)
    _check_head(form, stored)
    weights = {name: stored.read(name) for name in stored.shapes}
    convert = {"hf": to_hf, "timm": to_timm, "unilm": to_unilm}[form]
    kind = DTYPES[dtype][1]
    tensors = {
        name: (tensor.to(kind) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in convert(weights, stored.model).items()
    }
    texts: dict[str, Any] = {}
    if form == "hf":
        texts = {"config.json": hf_config(stored, dtype), "preprocessor_config.json": hf_processor(stored)}
    elif form == "timm":
        texts = {"config.json": timm_config(stored)}
    if form == "unilm":
        buffer = io.BytesIO()
        torch.save({"model": tensors, "epoch": 0, "args": unilm_args(stored)}, buffer)
        path, content = folder / PICKLE, buffer.getvalue()
    else:
        path, content = folder / FILE, safetensors.torch.save(tensors, metadata_of(stored, dtype))
    try:
        for name, value in texts.items():
            write_whole(folder / name, (json.dumps(value, indent=2) + "\n").encode())
        write_whole(path, content)
    except OSError as error:
        raise SpaceError(f"--out: {path} could not be written: {error.strerror}") from None
    made = _CLASSES[form, stored.kind]
    return Exported(
        path, len(tensors), len(content), f"{made}, {len(stored.classes)} classes" if stored.classes else made
    )


def _check_head(form: str, stored: StoredWeights) -> None:
    if stored.kind == "segmentation":
        raise ConfigError(
            "--to",
            form,
            f"a form that can hold a segmentation: {_NO_SEGMENTATION[form]}",
            "safetensors holds any model.",
        )
    if stored.kind != "pretraining":
        return
    model = stored.config.model
    if form not in _BACKBONES and form not in head_of(model).exports:
        raise ConfigError(
            "--to",
            form,
            f"a form that can hold the head of model.target={model.target}",
            f"safetensors holds any head; {', '.join(_BACKBONES)} is a bare backbone and leaves the head out.",
        )
