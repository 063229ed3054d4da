"""What a source of weights holds, before a model is made of it: a run, or files of any library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_dist.config.model import BackboneConfig, ModelConfig
from beit_dist.config.reading import recorded
from beit_dist.errors import WeightsError
from beit_dist.inference.provenance import Provenance
from beit_dist.models.heads.targets import HEADS
from beit_dist.storage.access import Access
from beit_dist.storage.place import is_url
from beit_dist.weights.foreign import SUFFIXES, Foreign, named, read_file
from beit_dist.weights.origin import KINDS, assumptions, sizes_of
from beit_dist.weights.stored import open_weights

_SEGMENTATION, _CLASSIFICATION = ("decode_head.conv_seg.weight",), ("head.weight", "fc_norm.weight")
"""What only such models have; a classifier's ``fc_norm`` tells that it looks at the mean of the patches."""


@dataclass(frozen=True)
class Opened:
    """Weights and all that is known of their model."""

    provenance: Provenance
    config: BackboneConfig
    """A :class:`ModelConfig` where there is a head of pre-training."""
    found: Foreign
    """The weights as they were stored, at their own resolution, and the names of the classes."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """How images are measured: sections of a recipe by name."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of a fine-tuned model; made up where nothing names them."""
        heads = (self.found.weights.get(name) for name in (*_SEGMENTATION, *_CLASSIFICATION))
        rows = next((len(head) for head in heads if head is not None), 0)
        known = self.found.classes
        return known if known is not None and len(known) == rows else tuple(f"class {n}" for n in range(rows))


def open_run(source: str, *, ema: bool, access: Access) -> Opened:
    """A run or step folder; errors are those of :func:`open_weights`."""
    if not is_url(source) and not Path(source).exists():
        raise WeightsError(
            f"{source} does not exist, expected a run, or a local file or folder of weights, or a URL. Download a "
            "model from a hub first"
        )
    if not is_url(source) and Path(source).is_file():
        suffixes = ", ".join(sorted(SUFFIXES))
        raise WeightsError(f"{source}: is no file of weights, whose names end in {suffixes}, and no run's folder")
    stored = open_weights(source, ema=ema, access=access, kinds=KINDS)
    manifest = stored.saved.manifest
    name = f"{source}, {stored.saved.folder.name}" + (", averaged weights" if ema else "")
    provenance = Provenance(
        name=name,
        kind=stored.kind,
        digest=manifest["state_digests"][stored.role],
        recipe=manifest["config"],
        tokenizer=manifest.get("tokenizer") if stored.kind == "pretraining" else None,
    )
    weights = {name: stored.read(name) for name in (*stored.shapes, *stored.buffers)}
    found = Foreign(weights, provenance.digest, classes=stored.classes, checkpoint=stored.saved.folder.name)
    return Opened(provenance, stored.model, found, {n: s.model_dump() for n, s in stored.measured.items()})


def open_file(path: Path, source: str) -> Opened:
    """A file or folder of Hugging Face, timm or unilm, or an export of ours.

    Args:
        path: on this machine.
        source: what the user calls it.

    Raises:
        WeightsError: it cannot be used.
    """
    try:
        found = read_file(path)
    except WeightsError as error:
        raise WeightsError(str(error).replace(str(path), source)) from None
    with named(source):
        kind, config = _kind(found.weights), _config(found)
    notes = [*found.notes, *assumptions(found, config)]
    if kind == "pretraining" and "head.weight" in found.weights:
        notes.append("its classifier looks at the class token, which none of ours does: it is left out")
    if kind != "pretraining" and found.classes is None:
        notes.append("that file does not name its classes: they are called by their numbers")
    provenance = Provenance(source, kind, found.digest, tuple(notes))
    return Opened(provenance, config, found, found.measured)


def _kind(weights: Mapping[str, Tensor]) -> str:
    for kind, names in (("segmentation", _SEGMENTATION), ("classification", _CLASSIFICATION)):
        if all(name in weights for name in names):
            return kind
    return "pretraining"


def _config(found: Foreign) -> BackboneConfig:
    """The settings of the model; of pre-training, those of its head too, if all that belongs to it is there."""
    sizes, names = sizes_of(found), found.weights
    target = next((name for name, head in HEADS.items() if f"{head.name}.weight" in names), None)
    if target is None or "mask_token" not in names or "norm.weight" not in names:
        return BackboneConfig(**sizes)
    known = {name: value for name, value in found.model.items() if name == "pixels"}
    if target == "tokens":
        known["vocabulary"] = len(names["lm_head.weight"])
    return recorded(ModelConfig, {**sizes, **known, "target": target})
