"""Where the trials of a study are, and what each was run with: a file beside its folder, written when it began.

A trial counts as done only if it was run as it would be now: with the same command and recipe, from trials that
were run alike. What was run otherwise is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.trials import Trial

SHOWN = {"work": "evidence", "data": "DATA", "recipes": "configs/evidence"}
"""How the places of a command are called in the results."""
_COMPARED = ("command", "recipe", "made_from")


@dataclass(frozen=True)
class Places:
    """Where things are."""

    work: Path
    data: Path
    recipes: Path
    precision: str = "fp32"
    """What models compute in."""

    def own(self, trial: Trial) -> Path:
        """The folder of a trial."""
        return self.work / trial.name

    def words(self, trial: Trial) -> list[str]:
        """Its command line with real paths."""
        named = {**vars(self), "own": self.own(trial)}
        return [word.format(**named) for word in trial.words]

    def done(self, trial: Trial) -> bool:
        """Whether a trial is done, as it would be run now."""
        return (self.own(trial) / trial.made).exists() and not self.differs(trial)

    def differs(self, trial: Trial) -> bool:
        """Whether it was begun, but otherwise than it would be now."""
        known = self.record(trial)
        if known is None:
            return (self.own(trial) / trial.made).exists()
        now = self.described(trial)
        return any(known.get(name) != now[name] for name in _COMPARED)

    def record(self, trial: Trial) -> dict[str, Any] | None:
        """What it was run with; None if it never began."""
        return _read(self._record(trial.name))

    def begin(self, trial: Trial, about: Mapping[str, Any]) -> None:
        """Write down what it is run with, at its first start.

        Args:
            about: what to add, such as the machine.
        """
        path = self._record(trial.name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps({**self.described(trial), **about}, indent=1) + "\n")
            partial.replace(path)

    def described(self, trial: Trial) -> dict[str, Any]:
        """What its result follows from: the command as it is shown, its recipe, and what it is made from."""
        shown = {**SHOWN, "precision": self.precision, "own": f"{SHOWN['work']}/{trial.name}"}
        words = self.words(trial)
        recipe = words[words.index("--config") + 1] if "--config" in words else None
        return {
            "command": " ".join(("beit", *(word.format(**shown) for word in trial.words))),
            "recipe": hashlib.sha256(Path(recipe).read_bytes()).hexdigest() if recipe else None,
            "made_from": {name: _digest(_read(self._record(name))) for name in trial.needs},
        }

    def _record(self, name: str) -> Path:
        return self.work / f"{name}.trial.json"


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return None


def _digest(record: Mapping[str, Any] | None) -> str | None:
    """Of the fields of a record that are compared."""
    if record is None:
        return None
    return hashlib.sha256(json.dumps([record[name] for name in _COMPARED]).encode()).hexdigest()
