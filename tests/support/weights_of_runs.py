"""Runs of any kind with one checkpoint of random values, as far as weights are read from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_dist.checkpoints.files import write_fragments
from beit_dist.checkpoints.image import FileImage
from beit_dist.checkpoints.layout import MANIFEST, Fragment, Saved, sealed
from beit_dist.config.model import BackboneConfig
from beit_dist.storage.local import LocalPlace
from beit_dist.weights.stored import StoredWeights

STEP = "step-00000005.a0001"


def values(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Random values in every tensor; norms around 1, variances above 0."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in shapes.items():
        drawn = 0.3 * torch.randn(list(shape), generator=generator)
        around_1 = name.endswith("running_var") or ("norm" in name and name.endswith("weight"))
        found[name] = drawn.abs() + 0.5 if around_1 else drawn
    return found


def a_run(
    folder: Path, kind: str, shapes: dict[str, list[int]], model: BackboneConfig, **facts: Any
) -> tuple[Path, dict[str, Tensor]]:
    """The run, whose files have no digests, and its weights and buffers.

    Args:
        folder: to be made.
        kind: of training.
        shapes: of the parameters.
        model: the backbone's settings.
        facts: what the manifest says besides, such as ``classes``, and shapes of ``buffers``.
    """
    step = folder / "checkpoints" / STEP
    step.mkdir(parents=True)
    buffers = facts.get("buffers", {})
    weights = values(shapes | buffers)
    fragments = [
        Fragment(name, "buffer" if name in buffers else "weight", 0, tensor.view(-1))
        for name, tensor in weights.items()
    ]
    write_fragments(LocalPlace(step), 0, FileImage.of(fragments))
    manifest = {
        "format": 1,
        "step": 5,
        "kind": kind,
        "position": {"samples": 80},
        "dataset": "d",
        "parameters": shapes,
        "state_digests": {"weight": "aa"},
        "files": [{"file": path.name, "bytes": 0, "sha256": ""} for path in sorted(step.iterdir())],
        "config": {"run": "r", "model": model.model_dump(mode="json")},
    }
    (step / MANIFEST).write_bytes(sealed({**manifest, **facts}))
    return folder, weights


def stored(folder: Path) -> StoredWeights:
    """The run's weights, whose bytes nobody verifies."""
    step = LocalPlace(folder / "checkpoints" / STEP)
    return StoredWeights(Saved(step, 5, 1, json.loads(step.read(MANIFEST))))
