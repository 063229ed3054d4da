"""``beit runs`` lists runs of every state, follows those that grow, and says what to do where there are none."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import ELSEWHERE, GONE, line, lines_of, make_run
from support.runs import Run, wait
from support.terminal import Terminal

from beit_dist.commands import runs
from beit_dist.commands.runs import Look, follow, main
from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of every state; the names say which."""
    now = time.time()
    elsewhere: dict[str, Any] = {"rank": ELSEWHERE}
    made: dict[str, dict[str, Any]] = {
        "running": {"quiet": 2.0, **elsewhere},
        "waiting": {"quiet": 20.0, "steps": 0, "saved": None, **elsewhere},
        "done": {"quiet": 300.0, "marker": "DONE", "step": 1000, **elsewhere},
        "old/preempted": {"quiet": 800.0, "marker": "PREEMPTED", "step": 90, **elsewhere},
        "old/failed": {"quiet": 900.0, "marker": "FAILED", "error": "out of memory\n...", **elsewhere},
        "old/stalled-in-a-sweep-of-learning-rates-1e-3": {"quiet": 1000.0, **elsewhere},
        "old/dead": {"quiet": 1100.0, "rank": GONE},
        "old/damaged": {"quiet": 1200.0, "marker": "DONE", **elsewhere},
    }
    for name, how in made.items():
        make_run(LocalPlace(tmp_path / "runs" / name), now, **how)
    (tmp_path / "runs" / "old" / "damaged" / "run.json").write_text("{")
    return tmp_path / "runs"


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


def test_every_state_is_listed_the_newest_activity_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, str(folder))
    assert [row.split()[:2] for row in lines[1:]] == [
        ["running", "running"],
        ["waiting", "waiting"],
        ["done", "done"],
        ["old/preempted", "preempted"],
        ["old/failed", "failed"],
        ["old/stalled-in-a-sweep-of-learning-rates-1e-3", "stalled"],
        ["old/dead", "dead"],
        ["old/damaged", "done"],
    ]
    assert lines[5].endswith("  out of memory")
    assert lines[8].endswith("  run.json: damaged")
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_what_fits_with_colours_unless_told_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    now = time.time()
    monkeypatch.setattr("beit_dist.commands.runs.time.time", lambda: now)  # the listings have ages in seconds
    lines = listed(capsys, str(folder))
    plain = [re.sub("\x1b\\[\\d+m", "", each) for each in lines]
    assert plain != lines
    assert max(map(len, plain)) <= 80
    assert re.search(r"old/stall\S*\.\.\S*1e-3 +stalled ", "\n".join(plain))
    assert "    out of memory" in plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert listed(capsys, str(folder)) == plain


def test_the_facts_are_written_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {run["name"]: run for run in json.loads("".join(listed(capsys, str(folder), "--json", "-")))}
    running = found["running"]
    assert running.items() >= {"kind": "pretraining", "state": "running", "step": 100, "total_steps": 1000}.items()
    assert running["baseline"] == {"name": "frequency", "value": 5.5}
    assert running["checkpoint"]["step"] == 90
    assert running["where"] == str(folder / "running")
    assert found["old/failed"]["note"] == "out of memory"
    assert found["old/damaged"]["damage"] == ["run.json: damaged"]


def test_a_run_that_is_named_is_told_at_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, str(folder / "old" / "failed"))
    assert lines[0].split() == ["run", str(folder / "old" / "failed")]
    assert "note        out of memory" in lines
    assert "step        100 of 1,000 (10.0%)" in lines


def test_several_folders_are_told_apart_by_their_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {row.split()[0] for row in listed(capsys, str(folder / "done"), str(folder / "old"))[1:]}
    assert {f"{folder}/done", f"{folder}/old/dead"} <= names


def test_runs_in_a_store_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{uuid.uuid4()}/runs"
    make_run(open_place(f"{url}/sweep/a"), time.time(), rank=ELSEWHERE, quiet=60.0)
    rows = listed(capsys, url)
    assert rows[1].split()[:4] == ["sweep/a", "running", "pretraining", "90/1,000"]


@pytest.mark.parametrize("words", [[], ["missing"], ["empty"], ["empty", "--follow"]], ids=str)
def test_where_there_are_no_runs_it_says_what_to_do(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(words) == 1
    said = capsys.readouterr()
    assert f"no runs in {(words or ['runs'])[0]}" in said.err
    assert "beit train run=runs/NAME" in said.err
    assert ("there is no such folder" in said.err) == (words[:1] != ["empty"])
    assert not said.out


def test_a_json_of_no_runs_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no --follow beside it"):
        main([str(tmp_path), "--follow", "--json", "-"])
    with pytest.raises(ConfigError, match=r"FOLDER: .*URL without user"):
        main(["s3://me:secret@bucket/runs"])


# ------------------------------------------------------------------------------------------------------ following


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run that takes a step, half of a next one, the rest, and is done, each after it was looked at."""
    run = LocalPlace(tmp_path / "run")
    now = time.time()
    make_run(run, now, steps=0, saved=None, rank=ELSEWHERE)
    third = lines_of(line(3, now + 1.0, loss=4.0))
    changes: list[Callable[[], object]] = [
        lambda: append(run.path, lines_of(line(1, now), line(2, now))),
        lambda: append(run.path, third[:30]),
        lambda: append(run.path, third[30:]),
        lambda: None,
        lambda: run.write("DONE", b'{"step": 3, "time": 3}'),
    ]

    def change(seconds: float) -> None:
        worker = threading.Thread(target=changes.pop(0))
        worker.start()
        worker.join()

    monkeypatch.setattr(runs.time, "sleep", change)
    yield run.path
    assert not changes


def append(run: Path, content: bytes) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(content)


def test_following_a_run_prints_a_line_for_each_change_until_it_is_done(
    growing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(growing), "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"  32 images/s.*", "", each) for each in lines] == [
        "run  waiting  no step of this start yet",
        "run  running  step 2/1,000  loss 5.0000 (frequency 5.5000)",
        "run  running  step 3/1,000  loss 4.0000 (frequency 5.5000)",
        "run  done  step 3/1,000  loss 4.0000 (frequency 5.5000)",
    ]


def test_following_on_a_terminal_draws_over_what_was_drawn(
    growing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "7")
    monkeypatch.setenv("TERM", "dumb")
    assert main([str(growing), "--follow"]) == 0
    frames = capsys.readouterr().out.split("\x1b[J")[:-1]
    assert len(frames) == 6
    drawn = [0, *(frame.count("\n") for frame in frames)]
    for frame, before in zip(frames, drawn, strict=False):
        assert frame.startswith(f"\x1b[{before}F" if before else "\x1b[2K")
        assert all(each.startswith("\x1b[2K") for each in frame.removeprefix(f"\x1b[{before}F").splitlines())
    assert max(drawn) == 6  # one line less than the terminal has
    assert "waiting" in frames[0]
    assert "done" in frames[-1]


def test_following_a_run_that_fails_ends_with_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "old" / "failed"), "--watch"]) == 1
    assert "out of memory" in capsys.readouterr().out


def test_following_a_folder_tells_of_new_runs_and_of_changes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def interrupt() -> None:  # raised: a signal would end the test process where it is not Python's to handle
        raise KeyboardInterrupt

    make_run(LocalPlace(tmp_path / "a"), time.time(), marker="DONE", step=5)
    changes: list[Callable[[], object]] = [
        lambda: make_run(LocalPlace(tmp_path / "b"), time.time(), rank=ELSEWHERE),
        lambda: None,
        interrupt,
    ]
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: changes.pop(0)())
    look = Look([str(tmp_path)], 3, Access())
    with pytest.raises(KeyboardInterrupt):
        follow(look, 1)
    assert [each.split()[:2] for each in capsys.readouterr().out.splitlines()] == [["a", "done"], ["b", "running"]]


def test_ctrl_c_ends_a_live_table_in_a_terminal(folder: Path) -> None:
    command = [sys.executable, "-m", "beit_dist", "runs", str(folder), "--follow", "--every", "1"]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "NO_COLOR": ""}
    with Terminal(command, cwd=ROOT, env=environment) as terminal:
        terminal.until("\x1b[J")
        assert "\x1b[32mrunning\x1b[0m" in terminal.shown
        terminal.ctrl_c()
        assert terminal.end() == 130
    assert "Traceback" not in terminal.shown


# ------------------------------------------------------------------------------------------------- what is real


def test_a_real_run_is_told_while_it_trains_when_it_is_killed_and_when_it_is_done(
    new_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run("real")

    def facts() -> dict[str, Any]:
        assert main([str(run.folder), "--json", "-"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)[0]
        return found

    process = run.start()
    deadline = time.monotonic() + 120
    while len(run.lines()) < 8 or not list(run.folder.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None, wait(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = facts()
    assert (found["state"], found["kind"], found["attempts"]) == ("running", "pretraining", 1)
    assert found["step"] >= 8
    assert found["total_steps"] == 46
    assert found["baseline"]["name"] in ("uniform", "frequency")
    for rank in run.facts()["ranks"]:
        os.kill(rank["pid"], signal.SIGKILL)
    wait(process)
    found = facts()
    saved = max(run.folder.glob("checkpoints/step-*/manifest.json"))
    assert (found["state"], found["step"], found["damage"]) == ("dead", run.lines()[-1]["step"], [])
    assert found["checkpoint"]["step"] == json.loads(saved.read_text())["step"]
    code, output = run.finish()
    assert code == 0, output
    found = facts()
    assert (found["state"], found["step"], found["attempts"], found["damage"]) == ("done", 46, 2, [])
    assert found["loss"] == run.lines()[-1]["loss"]
