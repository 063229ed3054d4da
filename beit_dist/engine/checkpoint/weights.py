"""The weights of a run as whole tensors, for pictures, export and evaluation; no DeepSpeed, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_dist.config import TrainConfig, validate
from beit_dist.engine.checkpoint.files import FragmentReader, file_fault
from beit_dist.engine.checkpoint.layout import WEIGHT, Fragment, Saved, committed, rank_records
from beit_dist.errors import CheckpointError


def load_weights(run_or_step: str | Path) -> tuple[dict[str, Tensor], TrainConfig, dict[str, Any]]:
    """The fp32 weights of a checkpoint by parameter name, its recipe, and its manifest.

    Args:
        run_or_step: a run folder, whose newest whole checkpoint is taken, or one ``step-...`` folder.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    path = Path(run_or_step)
    if (path / "manifest.json").is_file():
        candidates = [saved for saved in committed(path.parent) if saved.folder.name == path.name]
    else:
        candidates = committed(path / "checkpoints")
    faults = []
    for saved in candidates:
        fault = _first_fault(saved)
        if not fault:
            return _read(saved), validate(TrainConfig, saved.manifest["config"]), saved.manifest
        faults.append(f"{saved.folder.name}: {fault}")
    found = "; ".join(faults) or "nothing committed"
    raise CheckpointError(f"{path}: got {found}, expected a run folder or step folder with a whole checkpoint")


def _first_fault(saved: Saved) -> str:
    if not saved.manifest:
        return "its manifest is damaged"
    faults = (file_fault(saved.folder / f["file"], f["bytes"], f["sha256"]) for f in saved.manifest["files"])
    return next(filter(None, faults), "")


def _read(saved: Saved) -> dict[str, Tensor]:
    reader = FragmentReader(saved.folder, rank_records(saved))
    weights = {}
    for name, shape in saved.manifest["parameters"].items():
        weights[name] = torch.empty(shape, dtype=torch.float32)
        reader.fill(Fragment(name, WEIGHT, 0, weights[name].view(-1)))
    return weights
