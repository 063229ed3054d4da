"""What may differ between a run and the recipe that continues it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from beit_dist.config import TrainConfig
from beit_dist.engine.checkpoint.layout import committed
from beit_dist.errors import CheckpointError
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import is_url
from beit_dist.tokenizer_config import TokenizerRecipe

FROZEN = ("model", "masking", "seed")
"""Settings that make another run. The data set and the order of samples are compared by the plan's digests."""
SHOWN = ("optimizer", "epochs", "steps", "global_batch", "ema")
"""Settings that may change, and change what is learnt: the difference is printed."""


def compare_recipes(
    config: TrainConfig | TokenizerRecipe,
    manifest: Mapping[str, Any],
    *,
    loud: bool,
    frozen: Collection[str] = FROZEN,
    shown: Collection[str] = SHOWN,
    said: str = "changed on resume",
) -> None:
    """Compare a recipe with the one a checkpoint was made with.

    Args:
        loud: print what differs and may.
        frozen: settings that must not differ.
        shown: settings whose difference is printed.
        said: what is said of them.

    Raises:
        CheckpointError: a setting that cannot change on resume differs.
    """
    old, new = manifest["config"], config.model_dump(mode="json")
    if ("masking" in old) != ("masking" in new):
        kind = "pre-training" if "masking" in old else "a tokenizer's training"
        raise CheckpointError(f"run {config.run} cannot be continued: it is {kind}. Choose another run folder.")
    differences = {
        name: (was, now) for name, was, now in _differences(old, new, "") if name.partition(".")[0] in frozen
    }
    if differences:
        lines = "; ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in differences.items())
        raise CheckpointError(
            f"run {config.run} cannot be continued: {lines}. Put the settings back, or choose another run folder."
        )
    for name, was, now in _differences(old, new, ""):
        if loud and name.partition(".")[0] in shown:
            print(f"{said}: {name} was {was!r}, now {now!r}", flush=True)


def saved_precision(config: TrainConfig) -> str | None:
    """The precision of the newest checkpoint in the run folder, for a look from outside; None if there is none.

    A run in a store is not looked at: its owner's credentials may be elsewhere.
    """
    if is_url(config.run):
        return None
    manifests = (saved.manifest for saved in committed(open_place(config.run) / "checkpoints"))
    return next((str(manifest["precision"]) for manifest in manifests if manifest), None)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path, old, new
