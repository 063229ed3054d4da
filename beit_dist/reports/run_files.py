"""The files of a run as they are found: what is not there yet is left out, and what is damaged is named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

from beit_dist.checkpoints.layout import newest_first
from beit_dist.engine.checkpoint.attempts import Attempts
from beit_dist.engine.run_folder import DONE, FAILED, METRICS, PREEMPTED
from beit_dist.reports.history import Series, read_tail
from beit_dist.storage.place import Place

STATE_OF = {DONE: "done", PREEMPTED: "preempted", FAILED: "failed"}
"""What a marker says of its run."""


def read_mapping(run: Place, name: str, parse: Any, damage: list[str]) -> dict[str, Any]:
    """A file's content; nothing where it is not there yet, or is damaged."""
    try:
        found = parse(run.read(name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        damage.append(_refused(name, error))
        return {}
    except (ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        damage.append(f"{name}: damaged")
        return {}
    return found


def marker_of(run: Place, damage: list[str]) -> dict[str, Any] | None:
    """The newest marker. One without content, as a full disk leaves it, says its name all the same."""
    found = []
    for name, state in STATE_OF.items():
        try:
            there = run.exists(name)
        except OSError as error:
            damage.append(_refused(name, error))
            continue
        if there:
            found.append({**read_mapping(run, name, json.loads, damage), "state": state})
    return max(found, key=lambda marker: finite(marker, "time") or 0.0, default=None)


def newest_attempt(attempts: Attempts, damage: list[str]) -> int:
    """The number of the newest start; 0 if it cannot be read."""
    try:
        return attempts.newest()
    except OSError as error:
        damage.append(_refused("checkpoints/attempts", error))
        return 0


def mark_of(attempts: Attempts, number: int) -> dict[str, Any]:
    """Host and process id of rank 0 of a start that has not written ``run.json`` yet."""
    return read_mapping(attempts.place, f"{number:06d}", json.loads, [])


def began_at(attempts: Attempts, number: int) -> float | None:
    """Unix time at which a start began, where the file system tells it."""
    if not attempts.place.is_local:
        return None
    try:
        return (attempts.place.path / f"{number:06d}").stat().st_mtime
    except OSError:
        return None


def tail_of(run: Place, damage: list[str]) -> Series:
    """The last lines of its numbers."""
    try:
        steps, wrong = read_tail(run)
    except OSError as error:
        steps, wrong = Series([]), _refused(METRICS, error)
    damage += [wrong] if wrong else []
    return steps


def newest_saved(run: Place, damage: list[str]) -> tuple[int | None, float | None]:
    """Step and time of the newest whole checkpoint."""
    try:
        for saved in newest_first(run / "checkpoints"):
            if saved.manifest:
                return saved.step, finite(saved.manifest, "saved_at")
            damage.append(f"checkpoints/{saved.folder.name}/manifest.json: damaged")
    except OSError as error:
        damage.append(_refused("checkpoints", error))
    return None, None


def _refused(name: str, error: OSError) -> str:
    return f"{name}: {error.strerror or error}"


def finite(tree: Mapping[str, Any], *path: str) -> float | None:
    """A finite number in mappings of mappings; None where there is something else, or nothing."""
    value: Any = tree
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def whole(tree: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """The same, as an integer."""
    value = finite(tree, name)
    return default if value is None else int(value)
