"""The settings of runs: where several differ, or where one differs from the defaults; and all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit_dist.config.reading import validate
from beit_dist.errors import UserError
from beit_dist.reports.html.subject import Subject

_OWN = ("run",)
"""Settings that differ from run to run in any case."""


@dataclass(frozen=True)
class Settings:
    """Names of settings, and what each run has."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """A setting's name, and its values by column."""
    same: int
    """Settings that are not in the rows."""
    all: tuple[tuple[Subject, tuple[tuple[str, str], ...]], ...]
    """Every setting of each run."""


def settings_of(runs: Sequence[Subject]) -> Settings:
    """What to show of the runs' recipes."""
    flat = [flattened(run.recipe) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    everything = tuple((run, tuple(each.items())) for run, each in zip(runs, flat, strict=True) if each)
    if len(runs) > 1:
        rows = [(name, tuple(each.get(name, "not a setting of it") for each in flat)) for name in names]
        differing = tuple(row for row in rows if len(set(row[1])) > 1 and row[0] not in _OWN)
        columns = tuple(run.name for run in runs)
        heading = "Settings that differ" if differing else "All settings are the same"
        return Settings(heading, columns, differing, len(names) - len(differing), everything)
    defaults = _defaults(runs[0])
    (own,) = flat
    changed = tuple(
        (name, (value, defaults.get(name, "none"))) for name, value in own.items() if value != defaults.get(name)
    )
    return Settings(
        "Settings that are not the defaults", ("this run", "default"), changed, len(own) - len(changed), everything
    )


def _defaults(run: Subject) -> dict[str, str]:
    """What a recipe without a line comes to, but for what must be set."""
    if run.kind is None:
        return {}
    needed = {
        name: run.recipe[name]
        for name, setting in run.kind.schema.model_fields.items()
        if setting.is_required() and name in run.recipe
    }
    try:
        return flattened(validate(run.kind.schema, needed).model_dump(mode="json"))
    except UserError:
        return {}


def flattened(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Settings by their names on a command line, such as ``optimizer.lr``; values as YAML has them."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)
