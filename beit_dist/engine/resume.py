"""What may differ between a run and the recipe that continues it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from beit_dist.checkpoints.layout import Saved, committed, kind_of
from beit_dist.config.reading import recorded
from beit_dist.config.run import RunConfig
from beit_dist.engine.task import Progress, Task
from beit_dist.errors import CheckpointError, UserError
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import is_url


def compare_kinds(run: str, kind: str, manifest: Mapping[str, Any]) -> None:
    """Refuse a run folder of another kind.

    Args:
        run: the folder.
        kind: of the training that is started.
        manifest: of the folder's newest checkpoint.

    Raises:
        CheckpointError: it is.
    """
    if (saved := kind_of(manifest)) != kind:
        raise CheckpointError(
            f"run {run} cannot be continued: it holds a {saved} run, and this is a {kind} run. Choose another run "
            "folder."
        )
    if kind == "tokenizer" and "kind" not in manifest:
        version = manifest.get("versions", {}).get("beit_dist", "an older version")
        raise CheckpointError(
            f"run {run} cannot be continued: it is a tokenizer's training begun with beit_dist "
            f"{version}, whose settings had other names. Start again in another run folder."
        )


def compare_recipes(
    config: RunConfig,
    old: Mapping[str, Any],
    *,
    loud: bool,
    frozen: Collection[str],
    shown: Collection[str],
    said: str = "changed on resume",
) -> None:
    """Compare a recipe with the one a checkpoint was made with.

    Args:
        old: the checkpoint's, as its manifest has it.
        loud: print what differs and may.
        frozen: settings and sections that must not differ; others in a section of ``shown`` may.
        shown: settings whose difference is printed.
        said: what is said of them.

    Raises:
        CheckpointError: a setting that cannot change on resume differs.
    """
    try:
        was, now = recorded(type(config), old).model_dump(mode="json"), config.model_dump(mode="json")
    except UserError as error:
        raise CheckpointError(
            f"run {config.run} cannot be continued: its recorded recipe is not valid: {error}"
        ) from None
    found = list(_differences(was, now, ""))
    fixed = [difference for difference in found if _is_of(difference[0], frozen)]
    if fixed:
        lines = "; ".join(f"{name} was {before!r}, now {after!r}" for name, before, after in fixed)
        raise CheckpointError(
            f"run {config.run} cannot be continued: {lines}. Restore the settings, or choose another run folder."
        )
    for name, before, after in found:
        if loud and _is_of(name, shown):
            print(f"{said}: {name} was {before!r}, now {after!r}", flush=True)


def progress_of(task: Task[Any, Any, Any], manifest: Mapping[str, Any] | None) -> Progress:
    """Where a run is.

    Args:
        manifest: of the checkpoint that is continued; None for a new run.
    """
    counters = {"skipped": 0} | {number.name: 0 for number in task.known if number.kind == "counter"}
    if manifest is None:
        return Progress(first_batch=task.config.global_batch, counters=counters)
    position: Mapping[str, Any] = manifest["position"]
    counters |= manifest["counters"]
    return Progress(manifest["step"], position["samples"], position["first_batch"], counters)


def newest_saved(run: str) -> Saved | None:
    """The newest checkpoint in a run folder, for a look from outside; None if there is none.

    A run in a store is not looked at: its owner's credentials may be elsewhere.
    """
    if is_url(run):
        return None
    return next((saved for saved in committed(open_place(run) / "checkpoints") if saved.manifest), None)


def _is_of(name: str, settings: Collection[str]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path, old, new
