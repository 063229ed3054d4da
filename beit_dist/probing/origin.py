"""What is probed: the backbone of a run, or of a model of Hugging Face, timm or unilm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError, WeightsError
from beit_dist.models.vit import BeitBackbone
from beit_dist.storage.access import Access
from beit_dist.weights.foreign import is_foreign, named, read_file
from beit_dist.weights.origin import KINDS, as_finetuned, assumptions, backbone_of
from beit_dist.weights.stored import open_weights


@dataclass(frozen=True)
class Origin:
    """Weights, and where they are from."""

    name: str
    """For a person."""
    config: BackboneConfig
    weights: dict[str, Tensor]
    """Of the backbone, without mask token and final norm; fp32, on the CPU."""
    digest: str
    """Of what was read."""
    notes: tuple[str, ...] = ()
    """What was assumed, in words."""

    def facts(self) -> dict[str, Any]:
        """What features depend on."""
        return {"weights": self.digest, "model": self.config.model_dump(mode="json")}


def open_origin(source: str, *, ema: bool, access: Access) -> Origin:
    """The backbone in ``source``.

    Args:
        source: a run that pre-trains or fine-tunes, or one of its step folders, or their URL; or a file or folder
            of Hugging Face, timm or unilm, or of an export of ours.
        ema: the averaged weights of a run in place of the trained ones.
        access: how a URL is reached.

    Raises:
        CheckpointError: there is no whole checkpoint, or it holds no average.
        ConfigError: an average is asked of a file.
        WeightsError: there is nothing, or a file that cannot be used.
    """
    config = BackboneConfig(**backbone_of(source, access))
    with torch.device("meta"):
        names = [name for name, _ in BeitBackbone(config, masks=False, final_norm=False).named_parameters()]
    if is_foreign(source):
        return _from_file(source, config, names, ema)
    stored = open_weights(source, ema=ema, access=access, kinds=KINDS)
    weights = {name: stored.read(name) for name in names}
    name = f"{source}, {stored.saved.folder.name}" + (", averaged weights" if ema else "")
    return Origin(name, config, weights, stored.saved.manifest["state_digests"][stored.role])


def _from_file(source: str, config: BackboneConfig, names: list[str], ema: bool) -> Origin:
    if ema:
        raise ConfigError("--ema", source, "a run, as a file has no average beside its weights", "Leave it out.")
    found = read_file(source)
    with named(source):
        taken = as_finetuned(found, config, names, ())
    if missing := [name for name in names if name not in taken.weights]:
        raise WeightsError(f"{source}: got no {missing[0]}, expected all tensors of a BEiT v1 backbone")
    weights = {name: taken.weights[name] for name in names}
    return Origin(source, config, weights, found.digest, tuple(assumptions(found, config)))
