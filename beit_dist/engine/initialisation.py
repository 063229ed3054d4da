"""``init_from``: a new run that starts from the weights of another, or of another project."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit_dist.config import TrainConfig
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import WEIGHT
from beit_dist.engine.checkpoint.weights import StoredWeights, open_weights
from beit_dist.engine.distributed import Agreement
from beit_dist.engine.foreign import Foreign, is_foreign, read_foreign
from beit_dist.errors import CheckpointError, ConfigError, StorageError, WeightsError
from beit_dist.models.weights import PRETRAINING_ONLY
from beit_dist.storage.place import is_url

_NAMED = 4  # differences that a message lists


def initialise_from(
    config: TrainConfig,
    shapes: Mapping[str, Sequence[int]],
    tokenizer: str,
    state: EngineState,
    agreement: Agreement,
) -> dict[str, Any]:
    """Set the fp32 master weights to those of ``config.init_from``; the optimizer starts anew. Collective.

    Rank 0 finds the checkpoint and verifies every byte of it; each rank reads its own part.

    Args:
        config: the new run's recipe.
        shapes: shape of each of its parameters.
        tokenizer: digest of the tokenizer that made its shards.
        state: the engine's, of which the weights are filled.
        agreement: the ranks.

    Returns:
        What to record: the checkpoint's name and the digest of its weights.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: it has other parameters, or they mean something else.
        WeightsError: a file of another project cannot be used.
    """
    if is_foreign(str(config.init_from)):
        return _initialise_from_elsewhere(config, shapes, state, agreement)
    stored: StoredWeights | None = None
    fault = ""
    if agreement.ranks.rank == 0:
        try:
            stored = open_weights(str(config.init_from), access=config.storage.access)
        except (CheckpointError, StorageError) as error:
            fault = f"init_from: {error}"
            if not is_url(str(config.init_from)) and not Path(str(config.init_from)).exists():
                fault = (
                    f"init_from: got {config.init_from}, which is not there, expected a run, or a local file or "
                    "folder of weights. Download a model of a hub first"
                )
    stored, fault = agreement.from_rank_0((stored, fault))
    if stored is None:
        raise CheckpointError(fault)
    check_fit(config, shapes, stored)
    for fragment in state.held_fragments():
        if fragment.role == WEIGHT:
            stored.fill(fragment)
    state.publish(updates=0)
    manifest = stored.saved.manifest
    if agreement.ranks.rank == 0:
        print(f"weights of {config.init_from}, {stored.saved.folder.name}; the optimizer starts anew", flush=True)
        if manifest["tokenizer"] != tokenizer:
            print("init_from: that run learnt the tokens of another tokenizer; its head means others", flush=True)
    return {
        "source": str(config.init_from),
        "checkpoint": stored.saved.folder.name,
        "weights": manifest["state_digests"][WEIGHT],
    }


def _initialise_from_elsewhere(
    config: TrainConfig, shapes: Mapping[str, Sequence[int]], state: EngineState, agreement: Agreement
) -> dict[str, Any]:
    """The same from a file of Hugging Face, timm or unilm, which every rank reads."""
    source = str(config.init_from)
    found: Foreign | None = None
    fault = ""
    try:
        found = read_foreign(source, config.model)
        check_foreign(config, shapes, found)
    except (WeightsError, ConfigError) as error:
        fault = str(error) if isinstance(error, ConfigError) else f"init_from: {error}"
    fault = next(filter(None, agreement.gather(fault)), "")
    if fault or found is None:
        raise WeightsError(fault)
    for fragment in state.held_fragments():
        values = found.weights.get(fragment.parameter)
        if fragment.role == WEIGHT and values is not None:
            fragment.data.copy_(values.view(-1)[fragment.start : fragment.start + len(fragment.data)])
    state.publish(updates=0)
    anew = [name for name in shapes if name not in found.weights]
    if agreement.ranks.rank == 0:
        print(f"weights of {source}; the optimizer starts anew", flush=True)
        if anew:
            print(f"init_from: not in that file, so these start anew: {', '.join(anew)}", flush=True)
        if found.left_out:
            print(f"init_from: not of this model, so these are left out: {_listed(found.left_out)}", flush=True)
        for note in found.notes:
            print(f"init_from: {note}", flush=True)
        if "pixel_mean" not in found.known:
            print(
                "init_from: that file does not say how pixels were normalised; model.pixel_mean and "
                "model.pixel_std must be those it was trained with",
                flush=True,
            )
    return {"source": source, "checkpoint": None, "weights": found.digest}


def check_foreign(config: TrainConfig, shapes: Mapping[str, Sequence[int]], found: Foreign) -> None:
    """Refuse another project's weights if they are not those of this model.

    Only what pre-training alone needs, the mask token and the head, and the last norm, which fine-tuning drops,
    may be missing.

    Raises:
        ConfigError: as :func:`check_fit`.
    """
    may_lack = (*PRETRAINING_ONLY, "norm.weight", "norm.bias")
    theirs = {name: list(tensor.shape) for name, tensor in found.weights.items()}
    ours = {name: shape for name, shape in shapes.items() if name in theirs or name not in may_lack}
    _check_shapes(config, ours, theirs)
    _check_meaning(config, found.known)


def check_fit(config: TrainConfig, shapes: Mapping[str, Sequence[int]], stored: StoredWeights) -> None:
    """Refuse weights that are not those of this model.

    Raises:
        ConfigError: names the parameters that are missing, left over or of another shape, or the setting that
            gives the same shapes another meaning.
    """
    _check_shapes(config, shapes, stored.shapes)
    theirs = stored.config.model
    _check_meaning(config, {name: getattr(theirs, name) for name in ("heads", "pixel_mean", "pixel_std")})


def _check_shapes(
    config: TrainConfig, shapes: Mapping[str, Sequence[int]], theirs: Mapping[str, list[int]]
) -> None:
    ours = {name: list(shape) for name, shape in shapes.items()}
    differences = [f"{name} is missing" for name in ours if name not in theirs]
    differences += [f"{name} is no parameter of this model" for name in theirs if name not in ours]
    differences += [
        f"{name} is {theirs[name]}, not {shape}"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    if differences:
        raise ConfigError(
            "init_from",
            str(config.init_from),
            f"weights of the same model, but {_listed(differences)}",
            "Give this run the model settings of that one (its config.yaml), or leave init_from out.",
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _check_meaning(config: TrainConfig, known: Mapping[str, Any]) -> None:
    for name, there in known.items():
        here = getattr(config.model, name)
        pair = zip(here, there, strict=True) if isinstance(there, tuple) else [(here, there)]
        if not all(math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7) for one, other in pair):
            raise ConfigError(f"model.{name}", here, f"{there}, with which the weights of init_from were trained")
