"""The weights of a run, for pictures, export, evaluation and new runs; no DeepSpeed, no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from beit_dist.config import TrainConfig, validate
from beit_dist.engine.checkpoint.files import file_fault
from beit_dist.engine.checkpoint.layout import (
    AVERAGE,
    BAD,
    FORMAT_VERSION,
    GIVEN_UP,
    MANIFEST,
    WEIGHT,
    Fragment,
    Saved,
    committed,
    rank_records,
    read_manifest,
)
from beit_dist.engine.checkpoint.ranges import FragmentReader
from beit_dist.errors import CheckpointError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint's weights, read a tensor or a part of one at a time.

    Attributes:
        saved: the checkpoint.
        role: ``weight``, or ``ema`` for their average.
    """

    saved: Saved
    role: str = WEIGHT

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each parameter by name."""
        found: dict[str, list[int]] = self.saved.manifest["parameters"]
        return found

    @property
    def values(self) -> int:
        """Number of values of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def config(self) -> TrainConfig:
        """The run's recipe."""
        return validate(TrainConfig, self.saved.manifest["config"])

    def read(self, name: str) -> Tensor:
        """A whole parameter, fp32 on the CPU."""
        tensor = torch.empty(self.shapes[name], dtype=torch.float32)
        self.fill(Fragment(name, self.role, 0, tensor.view(-1)))
        return tensor

    def fill(self, fragment: Fragment) -> None:
        """Copy the values of the fragment's place into it, whatever its role."""
        self._reader.fill(Fragment(fragment.parameter, self.role, fragment.start, fragment.data))

    @cached_property
    def _reader(self) -> FragmentReader:
        return FragmentReader(self.saved.folder, rank_records(self.saved))


def open_weights(
    run_or_step: str | PathLike[str], *, ema: bool = False, access: Access | None = None
) -> StoredWeights:
    """Find a checkpoint and verify every byte of it.

    Args:
        run_or_step: a run folder, whose newest whole checkpoint is taken, or one ``step-...`` folder; or its URL.
        ema: the averaged weights in place of the trained ones.
        access: how a URL is reached.

    Raises:
        CheckpointError: there is no whole checkpoint, or it holds no average.
    """
    place = open_place(run_or_step, access)
    try:
        return _newest_whole(place, ema)
    except PermissionError as error:
        raise CheckpointError(f"{place} cannot be read: {error.filename}: {error.strerror}") from None


def _newest_whole(place: Place, ema: bool) -> StoredWeights:
    faults = []
    for saved in [_step_folder(place)] if place.exists(MANIFEST) else committed(place / "checkpoints"):
        fault = _first_fault(saved)
        if not fault:
            _check_kind(saved)
            if ema and AVERAGE not in saved.manifest["state_digests"]:
                raise CheckpointError(
                    f"{saved.folder}: got no averaged weights, expected a run with ema.decay set"
                )
            return StoredWeights(saved, AVERAGE if ema else WEIGHT)
        faults.append(f"{saved.folder.name}: {fault}")
    found = "; ".join(faults) or "nothing committed"
    raise CheckpointError(f"{place}: got {found}, expected a run folder or step folder with a whole checkpoint")


def _step_folder(place: Place) -> Saved:
    """The checkpoint in ``place``, which may be a copy under a name of the user's choice."""
    manifest = {} if place.exists(BAD) else read_manifest(place)
    return Saved(place, manifest.get("step", 0), manifest.get("attempt", 0), manifest)


def _check_kind(saved: Saved) -> None:
    """Refuse what is whole but holds no weights that this version can read as a BEiT model's."""
    version = saved.manifest.get("format")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{saved.folder}: got format {version}, expected {FORMAT_VERSION}")
    if "codebook" in saved.manifest:
        raise CheckpointError(
            f"{saved.folder}: got a checkpoint of a tokenizer's training, expected one of pre-training. A "
            "tokenizer's weights are in the file that tools/train_tokenizer.py wrote (--out)."
        )


def load_weights(
    run_or_step: str | PathLike[str], *, ema: bool = False
) -> tuple[dict[str, Tensor], TrainConfig, dict[str, Any]]:
    """The fp32 weights of a checkpoint by parameter name, its recipe, and its manifest.

    Arguments and errors are those of :func:`open_weights`.
    """
    stored = open_weights(run_or_step, ema=ema)
    return {name: stored.read(name) for name in stored.shapes}, stored.config, stored.saved.manifest


def _first_fault(saved: Saved) -> str:
    if not saved.manifest:
        return "its manifest is damaged"
    if GIVEN_UP in saved.manifest:
        return "it was never committed"
    faults = (file_fault(saved.folder, f["file"], f["bytes"], f["sha256"]) for f in saved.manifest["files"])
    return next(filter(None, faults), "")
