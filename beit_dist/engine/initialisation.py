"""``init_from``: a new run that starts from the weights of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from beit_dist.config import TrainConfig
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import WEIGHT
from beit_dist.engine.checkpoint.weights import StoredWeights, open_weights
from beit_dist.engine.distributed import Agreement
from beit_dist.errors import CheckpointError, ConfigError, StorageError

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
    """
    stored: StoredWeights | None = None
    fault = ""
    if agreement.ranks.rank == 0:
        try:
            stored = open_weights(str(config.init_from), access=config.storage.access)
        except (CheckpointError, StorageError) as error:
            fault = f"init_from: {error}"
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


def check_fit(config: TrainConfig, shapes: Mapping[str, Sequence[int]], stored: StoredWeights) -> None:
    """Refuse weights that are not those of this model.

    Raises:
        ConfigError: names the parameters that are missing, left over or of another shape, or the setting that
            gives the same shapes another meaning.
    """
    ours, theirs = {name: list(shape) for name, shape in shapes.items()}, stored.shapes
    differences = [f"{name} is missing" for name in ours if name not in theirs]
    differences += [f"{name} is no parameter of this model" for name in theirs if name not in ours]
    differences += [
        f"{name} is {theirs[name]}, not {shape}"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    if differences:
        more = len(differences) - _NAMED
        listed = "; ".join(differences[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ConfigError(
            "init_from",
            str(config.init_from),
            f"weights of the same model, but {listed}",
            "Give this run the model settings of that one (its config.yaml), or leave init_from out.",
        )
    for name in ("heads", "pixel_mean", "pixel_std"):
        here, there = getattr(config.model, name), getattr(stored.config.model, name)
        if here != there:
            raise ConfigError(f"model.{name}", here, f"{there}, with which the weights of init_from were trained")
