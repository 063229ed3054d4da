"""How long a run took, and where the time went: steps, waiting for data, measurements, all else; by start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from beit_dist.engine.durations import duration
from beit_dist.reports.html.charts import Chart, Line, draw
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject


@dataclass(frozen=True)
class Share:
    """Of the time."""

    name: str
    seconds: float
    text: str
    share: float
    """0 to 1."""


@dataclass(frozen=True)
class Start:
    """Of a run."""

    attempt: int
    first: int
    """The steps that it made, of which later starts may have made some again."""
    last: int
    lasted: str
    images_per_second: str


@dataclass(frozen=True)
class Timing:
    """Of a run."""

    total: str
    shares: tuple[Share, ...]
    starts: tuple[Start, ...]
    facts: tuple[tuple[str, str], ...]


def timing_of(run: Subject) -> Timing | Missing:
    """From the times that steps and measurements noted.

    Raises:
        KeyError, TypeError, ValueError: the numbers are damaged.
    """
    lines = run.history.trained.lines if run.history else []
    if not lines or "time" not in lines[-1]:
        return Missing("No step has noted its time.")
    starts = [list(own) for _, own in groupby(lines, lambda line: line.get("attempt"))]
    batch = lines[-1]["samples"] / lines[-1]["step"] if "samples" in lines[-1] else 0.0
    stepping = waiting = lasted = 0.0
    rows = []
    for own in starts:
        seconds, waited = _intervals(own, batch)
        first = _first_interval(own, batch)
        whole = max(seconds, own[-1]["time"] - own[0]["time"] + first)
        stepping, waiting, lasted = stepping + seconds, waiting + waited, lasted + whole
        speeds = [line["images_per_second"] for line in own if line.get("images_per_second")]
        rows.append(
            Start(
                int(own[0].get("attempt", 1)),
                own[0]["step"],
                own[-1]["step"],
                duration(whole),
                f"{np.median(speeds):,.0f}" if speeds else "",
            )
        )
    held_out = run.history.held_out.lines if run.history else []
    measuring = min(sum(float(line.get("seconds", 0)) for line in held_out), max(0.0, lasted - stepping))
    parts = (
        ("steps", stepping - waiting),
        ("waiting for data", waiting),
        ("measurements on held-out data", measuring),
        ("saves and all else", lasted - stepping - measuring),
    )
    shares = tuple(Share(name, each, duration(each), max(0.0, each) / max(lasted, 1e-9)) for name, each in parts)
    return Timing(duration(lasted), shares, tuple(rows), tuple(_facts(run, lines)))


def _intervals(lines: Sequence[dict[str, Any]], batch: float) -> tuple[float, float]:
    """Seconds of the logging intervals of a start, and those of them in which it waited for data."""
    seconds = waited = 0.0
    for _, own in groupby(lines, lambda line: line.get("time")):
        steps = list(own)
        if speed := steps[-1].get("images_per_second"):
            took = len(steps) * batch / speed
            seconds, waited = seconds + took, waited + took * float(steps[-1].get("data_wait") or 0.0)
    return seconds, waited


def _first_interval(lines: Sequence[dict[str, Any]], batch: float) -> float:
    """Of which only the end has a time."""
    first = [line for line in lines if line.get("time") == lines[0].get("time")]
    return _intervals(first, batch)[0]


def _facts(run: Subject, lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    peak = max((int(line.get("peak_memory") or 0) for line in lines), default=0)
    facts = [("ranks", f"{run.facts.get('world_size', '')}"), ("precision", f"{run.facts.get('precision', '')}")]
    facts.append(("ZeRO stage", f"{run.facts.get('stage', '')}"))
    if peak:
        facts.append(("most memory of a rank", f"{peak / 1e9:.2f} GB"))
    skipped = sum(bool(line.get("skipped")) for line in lines)
    if skipped:
        facts.append(("steps without an update", f"{skipped:,}, as gradients were not finite"))
    return [fact for fact in facts if fact[1]]


def speed_chart(runs: Sequence[Subject]) -> Chart | None:
    """Images a second of all runs, by step."""
    lines, said = [], []
    for run in runs:
        if run.history is None:
            continue
        trained = run.history.trained
        values = trained.values("images_per_second")
        if np.isfinite(values).any():
            lines.append(Line(trained.values("step"), values, "smooth", run.number))
            said.append(f"{run.name}: {np.nanmedian(values):,.0f} images/s in the median.")
    return draw(
        "Images a second",
        lines,
        along="optimizer step",
        summary="Images a second by step. " + " ".join(said),
        help="Over each logging interval, without saves and measurements.",
    )
