"""A checkpoint's weights as one safetensors file that anybody can read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import beit_dist
from beit_dist.checkpoints.layout import Fragment
from beit_dist.errors import SpaceError
from beit_dist.storage.durable import writing
from beit_dist.weights.stored import StoredWeights

DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16)}
"""Name on the command line to safetensors' name and torch's."""
FILE = "model.safetensors"
PICKLE = "model.pth"
"""The file of the form ``unilm``."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    tensors: int
    bytes: int
    reader: str = ""
    """Another project's class that reads them."""


def export_weights(
    stored: StoredWeights, out: str | Path, dtype: str = "fp32", advance: Callable[[int], None] = lambda _: None
) -> Exported:
    """Write the weights to ``out``, whole or not at all; memory is needed for one tensor.

    Parameters keep their names and shapes. The file's metadata says what is needed to use them: the model's
    settings, the normalisation of its pixels, the step, and the tokenizer whose tokens the head predicts, or the
    names of the classes and how images are measured.

    Args:
        stored: the weights.
        out: a folder, in which the file is ``model.safetensors``, or a file that ends with ``.safetensors``;
            replaced if it exists.
        dtype: ``fp32`` or ``bf16``, to which values are rounded.
        advance: called after each tensor with its number of values.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SpaceError: the disk is full, or cannot be written to.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        path /= FILE
    kind, torch_dtype = DTYPES[dtype]
    table: dict[str, object] = {"__metadata__": metadata_of(stored, dtype)}
    end, shapes = 0, stored.shapes | stored.buffers
    for name, shape in shapes.items():
        begin, end = end, end + torch_dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    # One buffer for all tensors: fresh ones of all sizes leave holes in memory that the next does not fit into.
    largest = torch.empty(max(map(math.prod, shapes.values())), dtype=torch.float32)
    buffers = (largest, largest.to(torch_dtype))
    try:
        with writing(path) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name, shape in shapes.items():
                values, rounded = (buffer[: math.prod(shape)] for buffer in buffers)
                stored.fill(Fragment(name, stored.role, 0, values))
                rounded.copy_(values)  # onto itself in fp32
                file.write(rounded.view(torch.uint8).numpy().data)
                advance(len(values))
    except OSError as error:
        raise SpaceError(f"--out: {path} could not be written: {error.strerror}") from None
    return Exported(path, len(shapes), 8 + len(header) + end)


def metadata_of(stored: StoredWeights, dtype: str) -> dict[str, str]:
    """safetensors allows text only; ``format`` is what its readers of torch tensors ask for."""
    manifest, model = stored.saved.manifest, stored.model
    found = {
        "format": "pt",
        "beit_dist": beit_dist.__version__,
        "kind": stored.kind,
        "model": model.model_dump_json(),
        "pixel_mean": json.dumps(model.pixel_mean),
        "pixel_std": json.dumps(model.pixel_std),
        "weights": stored.role,
        "dtype": dtype,
        "checkpoint": stored.saved.folder.name,
        "step": str(manifest["step"]),
        "samples": str(manifest["position"]["samples"]),
        "dataset": manifest["dataset"],
    }
    if stored.classes is not None:
        measured = {name: section.model_dump(mode="json") for name, section in stored.measured.items()}
        return {**found, "classes": json.dumps(stored.classes), "measured": json.dumps(measured)}
    return {**found, "tokenizer": manifest["tokenizer"]}
