"""The numbers that a run of any kind leaves: ``metrics.jsonl``, and ``validation.jsonl`` of what was held out."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.checkpoints.layout import newest_first
from beit_dist.engine.run_folder import METRICS, VALIDATION
from beit_dist.errors import DataError, StorageError
from beit_dist.storage.place import Place

TAIL_BYTES = 1 << 16
"""More than a hundred steps."""


@dataclass(frozen=True)
class Series:
    """Lines of numbers, one for a step, in ascending order."""

    lines: list[dict[str, Any]]

    @property
    def steps(self) -> NDArray[np.int64]:
        """(N,)"""
        return np.array([line["step"] for line in self.lines], np.int64)

    def values(self, name: str) -> NDArray[np.float64]:
        """(N,) of a number; NaN where it was not finite, is not there, or is no number."""
        found = [line.get(name) for line in self.lines]
        return np.array([value if isinstance(value, (int, float)) else math.nan for value in found], np.float64)

    def not_finite(self, name: str) -> NDArray[np.bool_]:
        """(N,) where a number was taken and was not finite."""
        return np.array([line.get(name, 0) is None for line in self.lines], np.bool_)


@dataclass(frozen=True)
class History:
    """All that a run has measured."""

    trained: Series
    """Of each step; at least one."""
    held_out: Series
    """Of each measurement on what is not trained on."""

    @property
    def resumed(self) -> tuple[int, ...]:
        """First step of each attempt but the first."""
        pairs = pairwise(self.trained.lines)
        return tuple(new["step"] for old, new in pairs if old.get("attempt") != new.get("attempt"))


def read_history(run: Place, damage: list[str] | None = None) -> History:
    """Read the numbers of a run: one JSON object per step, with ``step``, ``attempt`` and its numbers.

    A step that was trained twice counts as its last line says. A last line that is cut short, as a killed run
    leaves it, is left out. The numbers of a run at a URL lie in its checkpoints, the newest of which is taken.

    Args:
        damage: takes what is said of lines that are no steps, which are left out then.

    Raises:
        DataError: the file is missing, without a step, or, without ``damage``, holds something else.
        StorageError: the store does not answer, or refuses.
    """
    holder = _holder(run)
    try:
        trained = _series(holder.read(METRICS), f"{holder}/{METRICS}", damage)
    except StorageError:
        raise
    except OSError as error:
        raise DataError(
            f"{holder}/{METRICS}: cannot be read ({error.strerror or error}). Name a run folder in which training "
            "has begun."
        ) from None
    if not trained.lines:
        raise DataError(f"{holder}/{METRICS}: got no steps, expected at least one. Wait for its first step.")
    try:
        held_out = _series(holder.read(VALIDATION), f"{holder}/{VALIDATION}", damage)
    except (FileNotFoundError, NotADirectoryError):
        held_out = Series([])
    return History(trained, held_out)


def read_tail(run: Place, most: int = TAIL_BYTES) -> tuple[Series, str]:
    """The last steps of a run, which may be writing more: what the last ``most`` bytes of its numbers hold.

    Returns:
        The steps, of which there may be none yet; and what is damaged among them, empty if nothing.

    Raises:
        OSError: the file is there and cannot be read; of a store, that it does not answer, or refuses.
    """
    holder, content, first = _holder(run), b"", 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, EOFError):
        first = max(0, (size := holder.size(METRICS)) - most)
        content = bytes(holder.read_range(METRICS, first, size - first))  # at its end where a start has cut it
    begun = content.find(b"\n") + 1 if first else 0
    damage: list[str] = []
    return _series(content[begun:], METRICS, damage), damage[0] if damage else ""


def _holder(run: Place) -> Place:
    """Where the files of numbers lie."""
    if run.is_local or run.exists(METRICS):
        return run
    return next((saved.folder for saved in newest_first(run / "checkpoints")), run)


def _series(content: bytes, where: str, damage: list[str] | None = None) -> Series:
    """The steps of lines; what is no step goes to ``damage`` if that is given, where lines are not counted."""
    found: dict[int, dict[str, Any]] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            found[int(fields["step"])] = fields
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number == len(lines):
                break
            got = f"got {line[:60].decode(errors='replace')!r}, expected a JSON object with a step"
            if damage is None:
                raise DataError(f"{where}, line {number}: {got}") from None
            damage.append(f"{where}: {got}")
    return Series([found[step] for step in sorted(found)])


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred moving average over 4 % of the values; NaN counts as absent."""
    reach = max(1, len(values) // 50)
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    present = counts[last] - counts[first]
    mean = (sums[last] - sums[first]) / np.maximum(present, 1)
    return np.where(present > 0, mean, np.nan)
