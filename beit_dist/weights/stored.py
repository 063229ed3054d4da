"""The weights of a run, for pictures, export, evaluation and new runs; no DeepSpeed, no GPU."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from beit_dist.checkpoints.files import file_fault
from beit_dist.checkpoints.layout import (
    AVERAGE,
    BAD,
    BUFFER,
    FORMAT_VERSION,
    GIVEN_UP,
    MANIFEST,
    WEIGHT,
    Fragment,
    Saved,
    committed,
    kind_of,
    rank_records,
    read_manifest,
)
from beit_dist.checkpoints.ranges import FragmentReader
from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import Section, recorded
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
    def buffers(self) -> dict[str, list[int]]:
        """Shape by name of what the model keeps besides its parameters."""
        found: dict[str, list[int]] = self.saved.manifest.get("buffers", {})
        return found

    @property
    def values(self) -> int:
        """Number of values of all parameters and buffers."""
        return sum(math.prod(shape) for shape in (*self.shapes.values(), *self.buffers.values()))

    @property
    def kind(self) -> str:
        """Of the training."""
        return kind_of(self.saved.manifest)

    @property
    def config(self) -> PretrainingConfig:
        """The recipe of a pre-training run."""
        return recorded(PretrainingConfig, self.saved.manifest["config"])

    @property
    def model(self) -> BackboneConfig:
        """The settings of the backbone; of a pre-training run, those of the head too."""
        if self.kind == "pretraining":
            return self.config.model
        return recorded(BackboneConfig, self.saved.manifest["config"]["model"])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes of a fine-tuned model, in the order of its outputs."""
        found = self.saved.manifest.get("classes")
        return None if found is None else tuple(found)

    @property
    def measured(self) -> dict[str, Section]:
        """How a fine-tuned run measures images: the sections of its recipe by name."""
        if self.kind not in ("classification", "segmentation"):
            return {}
        recipe = recorded(FinetuningConfig, self.saved.manifest["config"])
        if self.kind == "classification":
            return {"augmentation": recipe.augmentation}
        return {"views": recipe.views, "segmentation": recipe.segmentation}

    def read(self, name: str) -> Tensor:
        """A whole parameter or buffer, fp32 on the CPU."""
        tensor = torch.empty({**self.shapes, **self.buffers}[name], dtype=torch.float32)
        self.fill(Fragment(name, self.role, 0, tensor.view(-1)))
        return tensor

    def fill(self, fragment: Fragment) -> None:
        """Copy the values of the fragment's place into it, whatever its role."""
        role = BUFFER if fragment.parameter in self.buffers else self.role
        self._reader.fill(Fragment(fragment.parameter, role, fragment.start, fragment.data))

    @cached_property
    def _reader(self) -> FragmentReader:
        return FragmentReader(self.saved.folder, rank_records(self.saved))


def open_weights(
    run_or_step: str | PathLike[str],
    *,
    ema: bool = False,
    access: Access | None = None,
    kinds: Collection[str] = ("pretraining",),
    verify: bool = True,
) -> StoredWeights:
    """Find a checkpoint and verify every byte of it.

    Args:
        run_or_step: a run folder, whose newest whole checkpoint is taken, or one ``step-...`` folder; or its URL.
        ema: the averaged weights in place of the trained ones.
        access: how a URL is reached.
        kinds: of training, one of which it must be of.
        verify: whether to look at more than the manifest, for whoever reads the weights.

    Raises:
        CheckpointError: there is no whole checkpoint, it is of another kind, or it holds no average.
    """
    place = open_place(run_or_step, access)
    try:
        return _newest_whole(place, ema, kinds, verify)
    except PermissionError as error:
        raise CheckpointError(f"{place} cannot be read: {error.filename}: {error.strerror}") from None


def _newest_whole(place: Place, ema: bool, kinds: Collection[str], verify: bool) -> StoredWeights:
    faults = []
    for saved in [_step_folder(place)] if place.exists(MANIFEST) else committed(place / "checkpoints"):
        fault = _first_fault(saved, verify)
        if not fault:
            _check_kind(saved, kinds)
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


def _check_kind(saved: Saved, expected: Collection[str]) -> None:
    """Refuse what is whole, but of another kind of training or in a format that this version cannot read."""
    version = saved.manifest.get("format")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{saved.folder}: got format {version}, expected {FORMAT_VERSION}")
    if (kind := kind_of(saved.manifest)) not in expected:
        way_out = "A tokenizer's weights are in the file that beit tokenizer wrote (--out)."
        raise CheckpointError(
            f"{saved.folder}: got a checkpoint of a {kind} run, expected one of a {' or '.join(expected)} run."
            + (f" {way_out}" if kind == "tokenizer" else "")
        )


def load_weights(
    run_or_step: str | PathLike[str], *, ema: bool = False
) -> tuple[dict[str, Tensor], PretrainingConfig, dict[str, Any]]:
    """The fp32 weights of a checkpoint by parameter name, its recipe, and its manifest.

    Arguments and errors are those of :func:`open_weights`.
    """
    stored = open_weights(run_or_step, ema=ema)
    return {name: stored.read(name) for name in stored.shapes}, stored.config, stored.saved.manifest


def _first_fault(saved: Saved, verify: bool) -> str:
    if not saved.manifest:
        return "its manifest is damaged"
    if GIVEN_UP in saved.manifest:
        return "it was never committed"
    if not verify:
        return ""
    faults = (file_fault(saved.folder, f["file"], f["bytes"], f["sha256"]) for f in saved.manifest["files"])
    return next(filter(None, faults), "")
