"""What a fine-tuned model takes over from the weights that it starts from: those of a run, or of a file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit_dist.config.model import HALF, BackboneConfig
from beit_dist.errors import ConfigError, WeightsError
from beit_dist.storage.access import Access
from beit_dist.storage.place import is_url
from beit_dist.weights.foreign import Foreign, is_foreign, named, read_file
from beit_dist.weights.names import (
    CLASS_LAYERS,
    PATCHES,
    TABLE,
    block_tables,
    fitted,
    is_extra,
    is_of_pretraining,
)
from beit_dist.weights.resampling import grid_of_table
from beit_dist.weights.stored import StoredWeights, open_weights

KINDS = ("pretraining", "classification", "segmentation")
"""Of the runs whose model has a backbone."""

_MEANING = ("heads", "pixel_mean", "pixel_std")
_SIZES = (
    *("width", "depth", "heads", "mlp_ratio", "image_size", "patch_size", "absolute_positions"),
    *("relative_positions", "block_positions", "layer_scale", "pixel_mean", "pixel_std"),
)
_HEAD_WIDTH = 64
"""Of an attention head, in all published models."""


def backbone_of(source: str, access: Access | None = None) -> dict[str, Any]:
    """The settings of the backbone that is in ``source``, by the names of :class:`BackboneConfig`.

    Of a run only the manifest is looked at. A file may not say how pixels were normalised; then that is left out.
    How many heads there are is told by relative position tables; without any, and if nothing else tells it, it is
    width / 64, and :func:`as_finetuned` says that it was assumed.

    Args:
        source: a run with a backbone, or one of its step folders, or their URL; or a file or folder that
            :func:`read_file` reads.
        access: how a URL is reached.

    Raises:
        CheckpointError: there is no whole checkpoint of such a run.
        WeightsError: there is nothing, or a file that cannot be used.
    """
    if is_foreign(source):
        found = read_file(source)
        with named(source):
            return sizes_of(found)
    if not is_url(source) and not Path(source).exists():
        raise WeightsError(
            f"{source} does not exist, expected a run, or a local file or folder of weights. Download a model "
            "from a hub first"
        )
    model = open_weights(source, access=access, kinds=KINDS, verify=False).model
    return {name: getattr(model, name) for name in _SIZES}


def sizes_of(found: Foreign) -> dict[str, Any]:
    """What :func:`backbone_of` finds in a file: from the shapes, and what is said beside them.

    Raises:
        WeightsError: there is no backbone.
    """
    weights, known = found.weights, found.known
    try:
        width, patch = weights[PATCHES].shape
        patch_size = math.isqrt(patch // 3)
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"got no backbone of BEiT v1 ({error})") from None
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    own = block_tables(weights)
    table = weights.get(own[0] if own else TABLE)
    sizes = {
        "width": width,
        "depth": len(blocks),
        "heads": max(1, width // _HEAD_WIDTH),
        "mlp_ratio": hidden / width,
        "patch_size": patch_size,
        "absolute_positions": "pos_embed" in weights,
        "relative_positions": table is not None,
        "block_positions": bool(own),
        "layer_scale": BackboneConfig.model_fields["layer_scale"].default
        if "blocks.0.gamma_1" in weights
        else 0.0,
    }
    if table is not None:
        sizes |= {"heads": table.shape[1], "image_size": patch_size * grid_of_table(len(table))}
    elif "pos_embed" in weights:
        sizes["image_size"] = patch_size * math.isqrt(weights["pos_embed"].shape[1] - 1)
    return sizes | {name: known[name] for name in _MEANING if name in known}


def assumptions(found: Foreign, config: BackboneConfig) -> list[str]:
    """What is assumed of a file that does not say it, in words."""
    notes = []
    if "pixel_mean" not in found.known:
        notes.append(
            f"that file does not say how pixels were normalised: mean and deviation of {HALF[0]} are assumed, "
            "those of the released models"
        )
    if "heads" not in found.known and not config.relative_positions:
        notes.append(f"that file does not say how many heads there are: {config.heads} are assumed")
    return notes


def check_meaning(model: BackboneConfig, known: Mapping[str, Any]) -> None:
    """Refuse weights that fit into ``model`` and mean something else there.

    Raises:
        ConfigError: they were trained with other heads, or another normalisation of pixels.
    """
    for name, there in known.items():
        here = getattr(model, name)
        pair = zip(here, there, strict=True) if isinstance(there, tuple) else [(here, there)]
        if not all(math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7) for one, other in pair):
            raise ConfigError(f"model.{name}", here, f"{there}, with which the weights of init_from were trained")


def meaning_of(stored: StoredWeights) -> dict[str, Any]:
    """What :func:`check_meaning` compares, of a run."""
    return {name: getattr(stored.model, name) for name in _MEANING}


def reminders(model: BackboneConfig, found: Foreign) -> list[str]:
    """What a file does not say and the user must know, in words."""
    notes = []
    if "pixel_mean" not in found.known:
        notes.append(
            "that file does not say how pixels were normalised; model.pixel_mean and model.pixel_std must be "
            "those it was trained with"
        )
    if "heads" not in found.known and not model.relative_positions:
        notes.append(f"that file does not say how many heads there are; model.heads is {model.heads}")
    return notes


def finetuned_from_run(
    stored: StoredWeights, model: BackboneConfig, shapes: Mapping[str, Sequence[int]], classes: Sequence[str]
) -> Foreign | None:
    """The weights of a run for a fine-tuned model; None where it is the same model, to be read part by part.

    Arguments and errors are those of :func:`as_finetuned`.
    """
    check_meaning(model, meaning_of(stored))
    theirs = stored.shapes | stored.buffers
    if theirs == {name: list(shape) for name, shape in shapes.items()} and stored.classes == tuple(classes):
        return None
    found = Foreign(
        weights={name: stored.read(name) for name in theirs if name in shapes or not is_of_pretraining(name)},
        digest=stored.saved.manifest["state_digests"][stored.role],
        known=meaning_of(stored),
        left_out=[name for name in theirs if name not in shapes and is_of_pretraining(name)],
        classes=stored.classes,
        checkpoint=stored.saved.folder.name,
    )
    return as_finetuned(found, model, shapes, classes)


def finetuned_from_file(
    source: str, model: BackboneConfig, names: Collection[str], classes: Sequence[str]
) -> Foreign:
    """The weights of a file of Hugging Face, timm or unilm, or an export of ours, for a fine-tuned model.

    Arguments and errors are those of :func:`as_finetuned` and :func:`read_file`.
    """
    found = read_file(source)
    check_meaning(model, found.known)
    with named(source):
        taken = as_finetuned(found, model, names, classes)
    return replace(taken, notes=[*taken.notes, *reminders(model, found)])


def as_finetuned(found: Foreign, model: BackboneConfig, names: Collection[str], classes: Sequence[str]) -> Foreign:
    """Weights at the resolution they were trained at, for a fine-tuned model (unilm ``run_class_finetuning.py``).

    A table that all blocks share becomes that of each block. Positions of another grid are resampled. The mask
    token, the heads of pre-training and its last norm are dropped, and so are heads that the model does not have.
    Layers with a row for each class stay if the classes are the same; else they start anew, as all does that is
    not there and not of the backbone.

    Args:
        found: what :func:`read_file` has read, or the same of a run.
        model: the new model's backbone.
        names: of the new model's parameters and buffers.
        classes: of its data, in their order; none where it has no head.

    Raises:
        WeightsError: the model has one table for all blocks, and those of the blocks differ; or positions or
            patches are of another size.
    """
    anew, note = _head_starts_anew(found, names, classes)
    kept, left_out = {}, list(found.left_out)
    for name, tensor in found.weights.items():
        class_layer = anew and name.startswith(CLASS_LAYERS)
        if class_layer or (name not in names and (is_extra(name) or is_of_pretraining(name))):
            left_out.append(name)
        else:
            kept[name] = tensor
    return replace(
        found,
        weights=fitted(kept, model),
        left_out=sorted(left_out),
        notes=[*found.notes, *note],
        may_lack=tuple(name for name in names if is_extra(name)),
    )


def _head_starts_anew(found: Foreign, names: Collection[str], classes: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the layers with a row for each class do, and what there is to say of it."""
    heads = [name for layer in CLASS_LAYERS if (name := f"{layer}weight") in found.weights and name in names]
    if not heads or not classes:
        return True, []
    if "head.weight" in heads and "fc_norm.weight" not in found.weights:
        return True, [
            "its head is on the class token and not on the mean of the patches, so it starts from scratch"
        ]
    count = len(found.weights[heads[0]])
    theirs = found.classes if found.classes is not None and len(found.classes) == count else None
    if count != len(classes):
        return True, [f"it has {count} classes and this data {len(classes)}, so the head starts from scratch"]
    if theirs is None:
        return False, [f"nothing names its {count} classes; they are taken for those of this data, in their order"]
    for number, (there, here) in enumerate(zip(theirs, classes, strict=True)):
        if there != here:
            return True, [
                f"its classes are others (class {number} is {there!r} there and {here!r} here), so the head "
                "starts from scratch"
            ]
    return False, []
