"""Runs as text: what a terminal of any width shows, and what a pipe gets."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest

from beit_dist.reports.run_state import RunState
from beit_dist.reports.run_table import cut, details, line_of, table
from beit_dist.step_numbers import Baseline

NOW = 2_000_000_000.0
BASE = RunState(
    where="/data/runs/base",
    name="base",
    kind="pretraining",
    state="running",
    step=123_456,
    total=500_000,
    loss=4.1102,
    baseline=Baseline("frequency", 5.6012),
    images_per_second=8123.4,
    seconds_left=4000.0,
    saved_step=123_000,
    saved_at=NOW - 720.0,
    attempts=3,
    active_at=NOW - 4.0,
)
RUNS = [
    BASE,
    dataclasses.replace(BASE, name="sweeps/2026-11/lr-1e-3_wd-0.05_warmup-10000_seed-17", state="preempted"),
    dataclasses.replace(
        BASE, name="実験/大きなモデル/学習率を下げた最後の実験", state="stalled", note="no step " * 30
    ),
    dataclasses.replace(BASE, name="bad\nname\x1b[31m", state="failed", loss=math.nan, note="x", damage=("f: 1",)),
    RunState(where="/r", name="new", state="waiting"),
    RunState(where="/s", name="shards", kind="shards", state="unfinished", step=3, total=40),
]
HEADINGS = ["NAME", "STATE", "KIND", "STEP", "LOSS", "BASELINE", "IMAGES/S", "LEFT", "SAVED", "ACTIVE", "STARTS"]


def columns(text: str) -> int:
    """Told in another way than the code does."""
    return sum(2 if "\u3000" <= character <= "\u9fff" else 1 for character in text)


def headings(width: int | None) -> list[str]:
    return table(RUNS, NOW, width)[0].split()


def test_eighty_columns_hold_state_step_loss_speed_and_time_left() -> None:
    lines = table(RUNS, NOW, 80)
    assert max(map(columns, lines)) <= 80
    assert lines[0].split() == ["NAME", "STATE", "STEP", "LOSS", "IMAGES/S", "LEFT", "SAVED"]
    assert lines[1].split() == ["base", "running", "123,456/500,000", "4.1102", "8,123", "67", "min", "12", "min"]
    assert re.match(r"sweep\S*\.\.\S*d-17 +preempted ", lines[2])  # both ends tell names apart
    assert re.match(r"実験\S*\.\.\S*実験 +stalled ", lines[3])
    assert lines[4].startswith("    no step no step")
    assert lines[4].endswith("..")
    assert lines[6:8] == ["    x", "    f: 1"]


@pytest.mark.parametrize("width", range(1, 220))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = table(RUNS, NOW, width) + [line for run in RUNS for line in details(run, NOW, width)]
    assert max(map(columns, table(RUNS, NOW, width))) <= width
    assert width < 20 or max(map(columns, lines)) <= width


def test_a_wider_terminal_shows_more_and_a_narrow_one_what_matters_most() -> None:
    shown = [headings(width) for width in range(30, 200)]
    for narrow, wide in itertools.pairwise(shown):
        assert len(narrow) <= len(wide) + 1  # a wide column may take the room of two that are less important
    assert headings(30)[:2] == ["NAME", "STATE"]
    assert shown[-1] == HEADINGS


def test_a_pipe_gets_everything_in_a_row_for_each_run() -> None:
    lines = table(RUNS, NOW, None)
    assert lines[0].split() == [*HEADINGS, "NOTE"]
    assert len(lines) == 1 + len(RUNS)
    assert "5.6012 frequency" in lines[1]
    assert RUNS[1].name in lines[2]
    assert lines[4].startswith("bad\\nname\\x1b[31m  ")
    assert lines[4].endswith("  x; f: 1")
    assert "  nan  " in lines[4]
    assert not any("\x1b" in line for line in lines)
    states = {len(line.partition(f"  {run.state}")[0]) for line, run in zip(lines[1:3], RUNS[:2], strict=True)}
    assert len(states) == 1  # aligned


@pytest.mark.parametrize("width", [25, 40, 80, 200])
def test_colours_change_nothing_but_the_colour_of_the_state(width: int) -> None:
    coloured = table(RUNS, NOW, width, colours=True)
    assert [re.sub("\x1b\\[\\d+m", "", line) for line in coloured] == table(RUNS, NOW, width)
    assert "\x1b[32mrunning\x1b[0m" in coloured[1]
    assert "\x1b[31mfailed\x1b[0m" in "\n".join(coloured)
    assert details(BASE, NOW, width, colours=True)[2].endswith("\x1b[32mrunning\x1b[0m")


def test_a_run_that_waits_for_data_says_it() -> None:
    assert "images/s    8,123 (data wait 37%)" in details(dataclasses.replace(BASE, data_wait=0.37), NOW, 80)
    assert "images/s    8,123" in details(dataclasses.replace(BASE, data_wait=0.02), NOW, 80)


def test_the_facts_of_one_run_are_all_told() -> None:
    assert details(BASE, NOW, 80) == [
        "run         /data/runs/base",
        "kind        pretraining",
        "state       running",
        "step        123,456 of 500,000 (24.7%)",
        "loss        4.1102",
        "baseline    5.6012 frequency",
        "images/s    8,123",
        "left        67 min",
        "checkpoint  of step 123,000, 12 min ago",
        "active      4 s ago",
        "started     3 times",
    ]
    assert details(RUNS[4], NOW, 80) == ["run    /r", "state  waiting"]


def test_a_line_of_a_log_tells_a_run() -> None:
    assert line_of(BASE, NOW) == (
        "base  running  step 123,456/500,000  loss 4.1102 (frequency 5.6012)  8,123 images/s  67 min left  "
        "saved at 123,000"
    )
    assert line_of(RUNS[4], NOW) == "new  waiting"
    assert line_of(RUNS[5], NOW) == "shards  unfinished  shards 3/40"


def test_texts_are_cut_in_the_middle_or_at_the_end() -> None:
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("abcdefghij", 7) == "ab..hij"
    assert cut("abcdefghij", 7, end=True) == "abcde.."
    assert cut("学習率を下", 7) == "学..下"
    assert [cut("abc", width) for width in (0, 1, 2)] == ["", ".", ".."]
