"""What a run is doing, read from its folder alone: nothing is asked of it, and nothing written.

A folder changes while it is looked at, and what a killed run leaves may be half a file. What cannot be read is
named in :attr:`RunState.damage`; the rest is told all the same.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import yaml

from beit_dist.engine.checkpoint.attempts import Attempts
from beit_dist.engine.durations import duration
from beit_dist.engine.run_folder import FAILED
from beit_dist.reports.history import Series
from beit_dist.reports.run_files import (
    STATE_OF,
    began_at,
    finite,
    mark_of,
    marker_of,
    newest_attempt,
    newest_saved,
    read_mapping,
    tail_of,
    whole,
)
from beit_dist.reports.stacks import waits_of
from beit_dist.step_numbers import Baseline, KnownBaselines, Number
from beit_dist.storage.place import Place

RUNNING, WAITING, STALLED, DEAD = "running", "waiting", "stalled", "dead"
_UNSAID = {STATE_OF[FAILED]: "the reason could not be written, as on a full disk: read the end of its output"}
"""Notes of markers without content."""

LOSS = Number(name="loss", help="", text="loss {:.4f}", better="lower")
"""What every kind of training calls what it minimises."""

_STALL, _START = 600.0, 3600.0
"""Seconds without a step, and without the first, after which a run counts as stalled: the default of
``watchdog.stall_seconds``, and what stands for ``watchdog.start_seconds``, whose default watches no start."""
_LATE = 900.0
"""Seconds without a checkpoint that are nothing to tell, however often the recipe asks for one."""

_REUSED = 3600.0
"""A process that began so many seconds after a start is another one of its number. When the system's clock is put
right, the times of processes move with it, but hardly by so much."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run has come to. What is not known is None, or empty."""

    where: str
    """Path or URL of its folder."""
    name: str
    """The end of ``where`` that tells it from the runs beside it."""
    kind: str = ""
    state: str = WAITING
    step: int | None = None
    total: int | None = None
    """Steps at which it is done."""
    loss: float | None = None
    """The mean of the last logging interval; NaN if a step's was not finite."""
    baseline: Baseline | None = None
    """The strongest of the loss."""
    images_per_second: float | None = None
    data_wait: float | None = None
    """Share of the last logging interval in which rank 0 waited for data."""
    seconds_left: float | None = None
    """Of a running run, at the pace of its last steps, saves and measurements included."""
    saved_step: int | None = None
    """Of the newest checkpoint."""
    saved_at: float | None = None
    """Unix time of its commit."""
    attempts: int = 0
    """How often the run was started."""
    active_at: float | None = None
    """Unix time of the last sign of life."""
    note: str = ""
    """Why it is in this state, where that needs a word."""
    waits: tuple[str, ...] = ()
    """Of a stalled run: what its ranks wait in, as far as they have written it."""
    damage: tuple[str, ...] = ()
    """Files that cannot be read, with what is wrong with them."""

    def facts(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        number = self.loss
        return {
            "name": self.name,
            "where": self.where,
            "kind": self.kind,
            "state": self.state,
            "step": self.step,
            "total_steps": self.total,
            "loss": number if number is None or math.isfinite(number) else None,
            "baseline": self.baseline and {"name": self.baseline.name, "value": self.baseline.value},
            "images_per_second": self.images_per_second,
            "data_wait": self.data_wait,
            "seconds_left": self.seconds_left,
            "checkpoint": None if self.saved_step is None else {"step": self.saved_step, "time": self.saved_at},
            "attempts": self.attempts,
            "last_activity": self.active_at,
            "note": self.note,
            "waits": list(self.waits),
            "damage": list(self.damage),
        }


@dataclass(frozen=True)
class _Start:
    """The newest start of a run."""

    number: int
    begun: float | None
    """Unix time."""
    hosts: tuple[str, ...]
    """Of its processes."""
    alive: bool | None
    """Whether one of those on this host runs; None: none of them is on this host."""
    marker: dict[str, Any] | None
    """How it ended, with its ``state``."""


def read_state(run: Place, name: str, now: float) -> RunState:
    """Look at a run.

    Args:
        run: its folder.
        name: what to call it.
        now: Unix time.
    """
    damage: list[str] = []
    facts = read_mapping(run, "run.json", json.loads, damage)
    config = read_mapping(run, "config.yaml", yaml.safe_load, damage)
    start = _newest_start(run, facts, damage)
    steps = tail_of(run, damage)
    saved_step, saved_at = newest_saved(run, damage)
    last = steps.lines[-1] if steps.lines else {}
    signs = (finite(last, "time"), saved_at, start.begun, finite(start.marker or {}, "time"))
    active_at = max((each for each in signs if each is not None), default=None)
    stepping = bool(last) and finite(last, "attempt") == start.number
    pace = _seconds_of_a_step(steps, config)
    limit = _patience(steps, config, pace, stepping, run.is_local)
    state, note = _judged(start, stepping, math.inf if active_at is None else now - active_at, limit)
    if state == RUNNING:
        note = _overdue(config, pace, saved_step, max(saved_at or 0.0, start.begun or now), now)
    step = whole(start.marker or {}, "step", whole(last, "step", saved_step))
    total = whole(facts, "total_steps", whole(config, "steps"))
    left = None
    if state == RUNNING and step is not None and total is not None and pace is not None:
        left = max(0, total - step) * pace
    return RunState(
        where=str(run),
        name=name,
        kind=str((start.marker or {}).get("kind") or facts.get("kind") or ""),
        state=state,
        step=step,
        total=total,
        loss=_loss(steps),
        baseline=_baseline(facts),
        images_per_second=finite(last, "images_per_second"),
        data_wait=finite(last, "data_wait"),
        seconds_left=left,
        saved_step=saved_step,
        saved_at=saved_at,
        attempts=start.number,
        active_at=active_at,
        note=note,
        waits=tuple(waits_of(run.path / "ranks", active_at or 0.0)) if state == STALLED and run.is_local else (),
        damage=tuple(dict.fromkeys(damage)),
    )


# ------------------------------------------------------------------------------------------------------- the state


def _newest_start(run: Place, facts: Mapping[str, Any], damage: list[str]) -> _Start:
    """Processes are looked for before the marker: one that ends in between has left it."""
    attempts = Attempts(run / "checkpoints")
    told = whole(facts, "attempt") or 0
    number = max(newest_attempt(attempts, damage), told)
    while True:
        begun = finite(facts, "started") if told == number else began_at(attempts, number)
        ranks = facts.get("ranks") if told == number else [mark_of(attempts, number)]
        processes = [each for each in ranks if isinstance(each, Mapping)] if isinstance(ranks, list) else []
        alive = _alive(processes, begun)
        marker = marker_of(run, damage)
        newer = newest_attempt(attempts, damage)
        if marker is not None or newer <= number:
            hosts = sorted({str(each["host"]) for each in processes if "host" in each})
            return _Start(number, begun, tuple(hosts), alive, marker)
        number = newer  # it has begun, and removed the marker, since we looked


def _judged(start: _Start, stepping: bool, quiet: float, limit: float) -> tuple[str, str]:
    """The state, and a note.

    Args:
        stepping: whether this start has recorded a step.
        quiet: seconds since the last sign of life.
        limit: after how many of them something is wrong.
    """
    if start.marker is not None:
        return start.marker["state"], reason_of(start.marker) or _UNSAID.get(start.marker["state"], "")
    if start.alive is False:
        ended = "its processes on this host ended and left no marker: killed, or unable to write it"
        return DEAD, f"{ended}; start it again with the same command"
    if quiet > limit:
        since = f"no sign of life for {duration(quiet)}" if math.isfinite(quiet) else "no sign of life"
        if start.alive:
            return STALLED, f"{since}, but its processes run: see ranks/*.stacks.txt in its folder"
        return STALLED, f"{since}; whether its processes run is known on {', '.join(start.hosts) or 'its hosts'}"
    return (RUNNING if stepping else WAITING), ("" if stepping else "no step of this start yet")


def _overdue(config: Mapping[str, Any], pace: float | None, saved: int | None, since: float, now: float) -> str:
    """A note where the time for two checkpoints has passed without one; nothing elsewhere.

    Args:
        pace: seconds of a step.
        saved: step of the newest checkpoint.
        since: Unix time of that checkpoint, or of the start that came after it.
        now: Unix time.
    """
    gap = _checkpoint_gap(config, pace)
    age = now - since
    if gap is None or age <= max(_LATE, 2 * gap):
        return ""
    last = "no checkpoint" if saved is None else f"no checkpoint since step {saved}"
    return f"{last}, for {duration(age)}; one is due every {duration(gap)}: search its output for 'not saved'"


def _checkpoint_gap(config: Mapping[str, Any], pace: float | None) -> float | None:
    """Seconds between checkpoints, as the recipe has it; None where it asks for none."""
    minutes, every = (finite(config, "checkpoint", name) for name in ("every_minutes", "every_steps"))
    gaps = [60 * minutes] if minutes else []
    gaps += [every * pace] if every and pace else []
    return min(gaps, default=None)


def reason_of(marker: Mapping[str, Any]) -> str:
    """One line of what a marker says: of a traceback the last, of all else the first."""
    lines = [line.strip() for line in str(marker.get("error") or marker.get("reason") or "").splitlines()]
    said = [line for line in lines if line] or [""]
    return said[-1 if said[0].startswith("Traceback") else 0]


def _patience(steps: Series, config: Mapping[str, Any], pace: float | None, stepping: bool, local: bool) -> float:
    """Seconds without a sign of life that are nothing unusual."""
    stall = finite(config, "watchdog", "stall_seconds") or _STALL
    if not stepping:
        return max(stall, finite(config, "watchdog", "start_seconds") or _START)
    times = sorted({time for line in steps.lines if (time := finite(line, "time")) is not None})
    interval = times[-1] - times[-2] if len(times) > 1 else 0.0
    if local:
        return stall + 2 * interval
    # The numbers come with the checkpoints.
    return stall + 2 * interval + 2 * (_checkpoint_gap(config, pace) or 0.0)


def _alive(processes: Sequence[Mapping[str, Any]], begun: float | None) -> bool | None:
    host = socket.gethostname()
    own = [each.get("pid") for each in processes if each.get("host") == host]
    return any(_runs(pid, begun) for pid in own) if own else None


def _runs(pid: Any, begun: float | None) -> bool:
    """Whether there is such a process, and it is not a later one of the same number."""
    if type(pid) is not int or pid < 1:
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return begun is None or process.create_time() <= begun + _REUSED
    except psutil.NoSuchProcess:
        return _is_hidden(pid)
    except psutil.Error:  # somebody else's
        return True


def _is_hidden(pid: int) -> bool:
    """Whether it is somebody else's, on a host where /proc shows each user their own (hidepid)."""
    try:
        os.kill(pid, 0)  # 0 is no signal: only the permission is checked
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


# ----------------------------------------------------------------------------------------------------- the numbers


def _seconds_of_a_step(steps: Series, config: Mapping[str, Any]) -> float | None:
    """Over the last steps of the start; of the last interval alone where there is no other."""
    last = steps.lines[-1] if steps.lines else {}
    own = [
        (step, time)
        for line in steps.lines
        if line.get("attempt") == last.get("attempt")
        and (step := whole(line, "step")) is not None
        and (time := finite(line, "time")) is not None
    ]
    if own and own[-1][0] > own[0][0] and own[-1][1] > own[0][1]:
        ends = {time: step for step, time in own}  # of each interval its last step
        (first_time, first), (last_time, final) = min(ends.items()), max(ends.items())
        if final > first:
            return (last_time - first_time) / (final - first)
    batch, speed = finite(config, "global_batch"), finite(last, "images_per_second")
    return batch / speed if batch and speed else None


def _loss(steps: Series) -> float | None:
    if not steps.lines:
        return None
    last = steps.lines[-1]
    interval = [line for line in steps.lines if "time" in last and line.get("time") == last["time"]] or [last]
    values = [line[LOSS.name] for line in interval if LOSS.name in line]
    if not values:
        return None
    numbers = [value for value in values if isinstance(value, (int, float))]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(values) else math.nan


def _baseline(facts: Mapping[str, Any]) -> Baseline | None:
    try:
        known = KnownBaselines.of_plain(facts.get("baselines") or {})
        return LOSS.strongest(known.training.get(LOSS.name, ()))
    except (AttributeError, TypeError, ValueError):
        return None
