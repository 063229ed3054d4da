"""A run as the page sees it: what its folder holds, as far as it can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from beit_dist.checkpoints.layout import committed
from beit_dist.config.reading import recorded
from beit_dist.config.run import RunConfig
from beit_dist.engine.durations import counted
from beit_dist.errors import DataError, UserError, printable
from beit_dist.reports.drawing import Kind, names_of, reaching, run_of
from beit_dist.reports.history import History, read_history
from beit_dist.reports.run_files import read_mapping
from beit_dist.reports.run_state import RunState, read_state
from beit_dist.step_numbers import KnownBaselines
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run that is reported."""

    number: int
    """By which it has its colour on the whole page."""
    name: str
    named: Place
    """What the user named: its folder, or one of its step folders."""
    place: Place
    """Its folder."""
    state: RunState
    facts: Mapping[str, Any]
    """``run.json``; empty where it cannot be read."""
    recipe: Mapping[str, Any]
    """``config.yaml``; empty where it cannot be read."""
    marker: Mapping[str, Any]
    """How it ended; empty while it has not."""
    kind: Kind | None
    config: RunConfig | None
    history: History | None
    """None where no step can be read."""
    baselines: KnownBaselines = field(default_factory=KnownBaselines)
    damage: tuple[str, ...] = ()
    """What is wrong with its files, for a person."""

    @property
    def title(self) -> str:
        """What it is, in words."""
        if self.kind is None or self.config is None:
            return "a run of a kind that cannot be told"
        found = self.kind.title(self.config)
        return found[0].upper() + found[1:]

    @property
    def has_checkpoint(self) -> bool:
        """Whether a whole checkpoint is named, or there is one in the folder."""
        return self.named != self.place or bool(committed(self.place / "checkpoints"))

    @property
    def error(self) -> str:
        """The whole of what ended it; empty where nothing did."""
        return "\n".join(map(printable, str(self.marker.get("error", "")).splitlines()))

    @property
    def versions(self) -> list[tuple[str, str]]:
        """Of what it ran with."""
        told = self.facts.get("versions")
        return [(str(name), str(text)) for name, text in told.items() if text] if isinstance(told, Mapping) else []

    @property
    def progress(self) -> str:
        """How far it has come."""
        step, total = self.state.step, self.state.total
        if step is None:
            return "no step yet"
        return f"step {step:,} of {total:,}" if total else counted(step, "step")


def open_subjects(wheres: Sequence[str], kinds: Mapping[str, Kind], access: Access, now: float) -> list[Subject]:
    """Look at runs.

    Raises:
        DataError: one is no run folder at all.
        StorageError: a store does not answer, or refuses.
    """
    return [
        _opened(number, where, name, kinds, access, now)
        for number, (where, name) in enumerate(zip(wheres, names_of(wheres), strict=True))
    ]


def _opened(number: int, where: str, name: str, kinds: Mapping[str, Kind], access: Access, now: float) -> Subject:
    named = open_place(where, access)
    place = run_of(named)
    state = read_state(place, name, now)
    damage: list[str] = []
    facts = read_mapping(place, "run.json", json.loads, damage)
    recipe = read_mapping(place, "config.yaml", yaml.safe_load, damage)
    if not (facts or recipe or state.attempts or damage):
        raise DataError(f"{where}: got no run, expected a run folder in which training has begun")
    kind = kinds.get(state.kind)
    config = _config(kind, recipe, access, damage)
    return Subject(
        number=number,
        name=name,
        named=named,
        place=place,
        state=state,
        facts=facts,
        recipe=recipe,
        marker=_marker(place, state),
        kind=kind,
        config=config,
        history=_history(place, damage),
        baselines=_baselines(kind, config, facts),
        damage=tuple(dict.fromkeys([*state.damage, *damage])),
    )


def _marker(place: Place, state: RunState) -> dict[str, Any]:
    name = state.state.upper()
    return read_mapping(place, name, json.loads, []) if name in ("DONE", "PREEMPTED", "FAILED") else {}


def _config(kind: Kind | None, recipe: Mapping[str, Any], access: Access, damage: list[str]) -> RunConfig | None:
    if kind is None or not recipe:
        return None
    try:
        return reaching(recorded(kind.schema, recipe), access)
    except UserError as error:
        damage.append(f"config.yaml: {error}")
        return None


def _history(place: Place, damage: list[str]) -> History | None:
    try:
        return read_history(place, damage)
    except (DataError, UnicodeDecodeError) as error:
        damage.append(str(error))
        return None


def _baselines(kind: Kind | None, config: RunConfig | None, facts: Mapping[str, Any]) -> KnownBaselines:
    """Those that the run noted, whose data may be gone; else what its recipe leads to."""
    try:
        noted = KnownBaselines.of_plain(facts["baselines"])
        if noted.training or noted.held_out:
            return noted
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    if kind is None or config is None or kind.baselines is None:
        return KnownBaselines()
    try:
        return kind.baselines(config)
    except (UserError, OSError):
        return KnownBaselines()
