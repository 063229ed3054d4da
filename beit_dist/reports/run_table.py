"""Runs as text: a table that fits the terminal, or all of it for a pipe; the facts of one run; a line of a log."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from beit_dist.engine.durations import counted, duration
from beit_dist.errors import printable
from beit_dist.reports.run_state import LOSS, RunState

_GAP = "  "
_NAME = 16
"""Columns that a shortened name keeps before another column is left out for it ..."""
_CUT = ".."
_NOTICED = 0.05
"""Share of the time from which on waiting for data is told."""
_COLOURS = {"running": 32, "done": 32, "waiting": 33, "preempted": 33, "stalled": 31, "dead": 31, "failed": 31}
"""By state: green, yellow and red, as terminals number them."""


class _Column(NamedTuple):
    heading: str
    importance: int
    """The least stays longest in a narrow terminal."""
    cell: Callable[[RunState, float], str]
    """Of a run, at a Unix time; empty where nothing is known."""
    right: bool = True
    """Whether it is aligned at its right end."""


def _ago(then: float | None, now: float) -> str:
    return "" if then is None else duration(max(0.0, now - then))


def _step(run: RunState, now: float) -> str:
    if run.step is None:
        return ""
    return f"{run.step:,}" if run.total is None else f"{run.step:,}/{run.total:,}"


def _loss(run: RunState, now: float) -> str:
    return "" if run.loss is None else LOSS.form(run.loss)


def _baseline(run: RunState, now: float) -> str:
    return f"{LOSS.form(run.baseline.value)} {run.baseline.name}" if run.baseline else ""


_COLUMNS = (
    _Column("NAME", 0, lambda run, now: printable(run.name), right=False),
    _Column("STATE", 0, lambda run, now: run.state, right=False),
    _Column("KIND", 8, lambda run, now: printable(run.kind), right=False),
    _Column("STEP", 1, _step),
    _Column("LOSS", 2, _loss),
    _Column("BASELINE", 6, _baseline, right=False),
    _Column("IMAGES/S", 4, lambda run, now: "" if (s := run.images_per_second) is None else f"{s:,.4g}"),
    _Column("LEFT", 3, lambda run, now: "" if run.seconds_left is None else duration(run.seconds_left)),
    _Column("SAVED", 5, lambda run, now: _ago(run.saved_at, now)),
    _Column("ACTIVE", 7, lambda run, now: _ago(run.active_at, now)),
    _Column("STARTS", 9, lambda run, now: f"{run.attempts}" if run.attempts else ""),
)


def remarks(run: RunState) -> list[str]:
    """What a row has to say beside its numbers."""
    return [printable(each) for each in (run.note, *run.damage) if each]


def table(runs: Sequence[RunState], now: float, width: int | None, *, colours: bool = False) -> list[str]:
    """A heading and a row for each run.

    Args:
        runs: at least one.
        now: Unix time.
        width: columns of the terminal. The least important are left out, names are shortened in their middle, and
            remarks stand below their row. None: all of it, a row for a run, remarks at its end.
        colours: whether states are coloured.
    """
    cells = {column: [column.cell(run, now) for run in runs] for column in _COLUMNS}
    widths = {column: max(map(_width, [column.heading, *cells[column]])) for column in _COLUMNS}
    shown, name = list(_COLUMNS), _COLUMNS[0]
    if width is not None:
        shown, widths[name] = _fitting(widths, width)

    def row(texts: Sequence[str], last: str = "") -> str:
        padded = (_padded(text, widths[column], column.right) for column, text in zip(shown, texts, strict=True))
        line = _GAP.join([*padded, last] if width is None else padded).rstrip()
        return line if width is None else cut(line, width, end=True)

    lines = [row([column.heading for column in shown], "NOTE")]
    for place, run in enumerate(runs):
        line = row([cells[column][place] for column in shown], "; ".join(remarks(run)))
        if colours:
            at = len(_padded(cells[name][place], widths[name], False)) + len(_GAP)
            line = line[:at] + _coloured(line[at : at + len(run.state)], run) + line[at + len(run.state) :]
        below = [] if width is None else remarks(run)
        lines += [line, *(cut(f"    {remark}", width or 0, end=True) for remark in below)]
    return lines


def details(run: RunState, now: float, width: int | None, *, colours: bool = False) -> list[str]:
    """All that is known of a run, a line for each."""
    rows = [(subject, text) for subject, text in _subjects(run, now) if text]
    size = max(len(subject) for subject, _ in rows)
    lines = []
    for subject, text in rows:
        start = f"{subject:<{size}}{_GAP}"
        shown = text if width is None else cut(text, max(1, width - len(start)), end=subject == "note")
        lines.append(start + (_coloured(shown, run) if colours and subject == "state" else shown))
    return lines


def line_of(run: RunState, now: float) -> str:
    """A run in one line, for a log."""
    left = "" if run.seconds_left is None else f"{duration(run.seconds_left)} left"
    speed = "" if run.images_per_second is None else f"{run.images_per_second:,.4g} images/s"
    loss = f"loss {_loss(run, now)}" if run.loss is not None else ""
    baseline = f" ({run.baseline.name} {LOSS.form(run.baseline.value)})" if loss and run.baseline else ""
    saved = "" if run.saved_step is None else f"saved at {run.saved_step:,}"
    step = f"{_unit(run)} {_step(run, now)}" if run.step is not None else ""
    parts = [printable(run.name), run.state, step, loss + baseline, speed, left, saved, *remarks(run)]
    return _GAP.join(part for part in parts if part)


def cut(text: str, width: int, *, end: bool = False) -> str:
    """``text`` in so many columns, without its middle, or its end, where it is wider."""
    if _width(text) <= width:
        return text
    room = max(0, width - len(_CUT))
    head = room if end else room // 2
    kept = _start(text, head)
    return (kept + _CUT + _start(text[::-1], room - head)[::-1])[: max(width, 0)]


def _subjects(run: RunState, now: float) -> Iterator[tuple[str, str]]:
    yield "run", printable(run.where)
    yield "kind", printable(run.kind)
    yield "state", run.state
    for remark in remarks(run):
        yield "note", remark
    for wait in run.waits:
        yield "waits", printable(wait)
    share = f" ({run.step / run.total:.1%})" if run.step is not None and run.total else ""
    yield _unit(run), _step(run, now).replace("/", " of ") + share
    yield "loss", _loss(run, now)
    yield "baseline", _baseline(run, now)
    yield "images/s", "" if run.images_per_second is None else f"{run.images_per_second:,.4g}{_waiting(run)}"
    yield "left", "" if run.seconds_left is None else duration(run.seconds_left)
    if run.saved_step is not None:
        ago = "" if run.saved_at is None else f", {_ago(run.saved_at, now)} ago"
        yield "checkpoint", f"of step {run.saved_step:,}{ago}"
    yield "active", "" if run.active_at is None else f"{_ago(run.active_at, now)} ago"
    yield "started", counted(run.attempts, "time") if run.attempts else ""


def _waiting(run: RunState) -> str:
    """As the progress line says it, from a few per cent on."""
    share = run.data_wait
    return f" (data wait {share:.0%})" if share is not None and share >= _NOTICED else ""


def _unit(run: RunState) -> str:
    return "shards" if run.kind == "shards" else "step"


def _fitting(widths: dict[_Column, int], width: int) -> tuple[list[_Column], int]:
    """The columns that fit beside a name, which may be shortened, and the room that is left for it."""
    name, state, *others = _COLUMNS
    least = max(1, min(widths[name], _NAME, width - len(_GAP) - widths[state]))
    shown, used = {name, state}, least + len(_GAP) + widths[state]
    for column in sorted(others, key=lambda column: column.importance):
        if used + len(_GAP) + widths[column] <= width:
            shown.add(column)
            used += len(_GAP) + widths[column]
    room = max(1, min(widths[name], least + width - used))
    return [column for column in _COLUMNS if column in shown], room


def _padded(text: str, width: int, right: bool) -> str:
    text = cut(text, width)
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _coloured(text: str, run: RunState) -> str:
    code = _COLOURS.get(run.state)
    return f"\033[{code}m{text}\033[0m" if code else text


def _width(text: str) -> int:
    """Columns of a terminal: two for wide characters, none for those that combine with the one before."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _start(text: str, width: int) -> str:
    used = 0
    for place, character in enumerate(text):
        used += _columns(character)
        if used > width:
            return text[:place]
    return text
