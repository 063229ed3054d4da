"""The state of a run, from folders of every state, of damaged files, and of files that change meanwhile."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.run_folders import CONFIG, ELSEWHERE, GONE, HERE, line, lines_of, make_run

from beit_dist.checkpoints.layout import MANIFEST, folder_name
from beit_dist.reports.history import read_tail
from beit_dist.reports.run_search import find_runs
from beit_dist.reports.run_state import RunState, read_state
from beit_dist.step_numbers import Baseline
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place

NOW = 2_000_000_000.0
"""After every process of this machine began, so a process that runs is none that came later."""


@pytest.fixture
def run(tmp_path: Path) -> LocalPlace:
    return LocalPlace(tmp_path / "run")


def look(run: Any, now: float = NOW) -> RunState:
    return read_state(run, "run", now)


def test_a_running_run_tells_its_numbers(run: LocalPlace) -> None:
    make_run(run, NOW, steps=100, saved=90, attempt=3)
    found = look(run)
    assert (found.state, found.kind, found.step, found.total) == ("running", "pretraining", 100, 1000)
    assert (found.loss, found.baseline) == (5.0, Baseline("frequency", 5.5))
    assert (found.images_per_second, found.seconds_left) == (32.0, pytest.approx(1800.0))
    assert (found.saved_step, found.saved_at, found.attempts) == (90, NOW - 23.0, 3)
    assert found.active_at == NOW - 3.0
    assert (found.note, found.damage) == ("", ())


STATES: dict[str, tuple[dict[str, Any], str, str]] = {
    "done": ({"marker": "DONE", "step": 1000}, "done", ""),
    "preempted": ({"marker": "PREEMPTED", "step": 90, "reason": "SIGUSR1"}, "preempted", "SIGUSR1"),
    "failed": (
        {"marker": "FAILED", "error": "data: got 3, expected 4\nand more", "quiet": 9e6},
        "failed",
        "data: got 3, expected 4",
    ),
    "a traceback": (
        {"marker": "FAILED", "error": "Traceback (most recent call last):\n  File x\nKeyError: 'a'\n"},
        "failed",
        "KeyError: 'a'",
    ),
    "stalled": ({"quiet": 700.0}, "stalled", "no sign of life for 12 min, but its processes run"),
    "slow": ({"quiet": 500.0}, "running", ""),
    "stalled elsewhere": ({"quiet": 700.0, "rank": ELSEWHERE}, "stalled", "is known on node-17"),
    "running elsewhere": ({"quiet": 50.0, "rank": ELSEWHERE}, "running", ""),
    "dead": ({"rank": GONE}, "dead", "ended and left no marker"),
    "done, and its processes with it": ({"rank": GONE, "marker": "DONE"}, "done", ""),
    "no step yet": ({"steps": 0, "quiet": 1200.0, "saved": None}, "waiting", "no step of this start yet"),
    "starting elsewhere": ({"steps": 0, "saved": None, "rank": ELSEWHERE, "quiet": 2000.0}, "waiting", "no step"),
    "never a step": ({"steps": 0, "saved": None, "rank": ELSEWHERE, "quiet": 9e3}, "stalled", "no sign of life"),
    "no run.json yet": ({"steps": 0, "run_json": False}, "waiting", "no step of this start yet"),
    "killed before run.json": ({"steps": 0, "run_json": False, "rank": GONE}, "dead", "left no marker"),
}


@pytest.mark.parametrize(("made", "state", "note"), STATES.values(), ids=STATES)
def test_every_state_is_told_from_the_folder(run: LocalPlace, made: dict[str, Any], state: str, note: str) -> None:
    now = time.time() if made.get("steps") == 0 else NOW  # a start without a step is as old as its process or file
    make_run(run, now, **made)
    found = look(run, now)
    assert (found.state, found.damage) == (state, ())
    assert note in found.note if note else not found.note
    assert (found.seconds_left is not None) == (state == "running")


@pytest.mark.parametrize(
    ("age", "checkpoint", "said"),
    [
        (1700.0, {"every_minutes": 15.0}, ""),
        (1900.0, {"every_minutes": 15.0}, "since step 90, for 32 min; one is due every 15 min: search its output"),
        (1900.0, {"every_minutes": None}, ""),
        (1900.0, {"every_minutes": None, "every_steps": 100}, "one is due every 3.3 min"),
        (1900.0, {"every_minutes": None, "every_steps": 500}, ""),
        (800.0, {"every_minutes": None, "every_steps": 10}, ""),
    ],
)
def test_checkpoints_that_do_not_come_are_told(
    run: LocalPlace, age: float, checkpoint: dict[str, Any], said: str
) -> None:
    make_run(run, NOW)
    saved_at = NOW - 23.0
    later = saved_at + age
    run.write("config.yaml", yaml.safe_dump({**CONFIG, "checkpoint": checkpoint}).encode())
    run.write("metrics.jsonl", lines_of(*(line(step, later - 2.0 * (900 - step)) for step in range(800, 901))))
    facts = json.loads(run.read("run.json"))
    run.write("run.json", json.dumps({**facts, "started": saved_at - 500.0}).encode())
    found = look(run, later)
    assert found.state == "running"
    assert said in found.note if said else not found.note
    run.write("run.json", json.dumps({**facts, "started": later - 60.0}).encode())
    assert not look(run, later).note  # what came before this start is not its own


def test_a_start_that_follows_is_not_judged_by_the_one_before(run: LocalPlace) -> None:
    make_run(run, NOW, steps=100, attempt=1, rank=GONE)
    assert look(run).state == "dead"
    mark = {"host": "node-17", "pid": 4}
    (run / "checkpoints" / "attempts").write("000002", json.dumps(mark).encode())
    found = look(run, NOW)
    assert (found.state, found.attempts, found.step) == ("waiting", 2, 100)


def test_a_start_that_begins_during_the_look_is_seen(run: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(run, NOW, rank=GONE, marker="PREEMPTED", step=90)
    exists = LocalPlace.exists

    def begins(place: LocalPlace, name: str) -> bool:
        if name == "DONE" and place.folder == run.folder and exists(run, "PREEMPTED"):
            run.remove("PREEMPTED")
            (run / "checkpoints" / "attempts").write("000002", json.dumps({"host": "node-17", "pid": 4}).encode())
        return exists(place, name)

    monkeypatch.setattr(LocalPlace, "exists", begins)
    assert (look(run).state, look(run).attempts) == ("waiting", 2)


def test_a_process_that_has_got_the_number_of_a_dead_one_is_not_taken_for_it(run: LocalPlace) -> None:
    make_run(run, NOW)
    facts = json.loads(run.read("run.json"))
    run.write("run.json", json.dumps({**facts, "started": facts["started"] - 3700}).encode())
    assert look(run).state == "dead"


def test_a_process_that_has_ended_and_is_not_yet_waited_for_is_dead(run: LocalPlace) -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        make_run(run, NOW, rank={"rank": 0, "host": HERE, "pid": process.pid})
        assert look(run).state == "dead"


def test_a_process_of_somebody_else_that_proc_hides_is_alive(
    run: LocalPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, number: int) -> None:
        assert number == 0  # which sends nothing
        raise PermissionError(1, "Operation not permitted")

    make_run(run, NOW, rank=GONE)
    monkeypatch.setattr("os.kill", refuse)
    assert look(run).state == "running"


def test_a_loss_is_the_mean_of_its_interval_and_not_finite_if_one_is(run: LocalPlace) -> None:
    make_run(run, NOW, steps=0)
    before = line(7, NOW - 20.0, loss=100.0)
    run.write("metrics.jsonl", lines_of(before, line(8, NOW, loss=4.0), line(9, NOW, loss=2.0)))
    assert look(run).loss == 3.0
    run.write("metrics.jsonl", lines_of(before, line(8, NOW, loss=None), line(9, NOW, loss=2.0)))
    found = look(run)
    assert found.loss is not None
    assert math.isnan(found.loss)
    assert found.facts()["loss"] is None


def test_steps_of_an_older_version_come_from_the_recipe(run: LocalPlace) -> None:
    make_run(run, NOW)
    facts = json.loads(run.read("run.json"))
    del facts["total_steps"], facts["baselines"]
    run.write("run.json", json.dumps(facts).encode())
    assert (look(run).total, look(run).baseline, look(run).seconds_left) == (None, None, None)
    run.write("config.yaml", b"{steps: 500, global_batch: 64}")
    assert look(run).total == 500


def test_a_line_that_is_being_written_is_left_out(run: LocalPlace) -> None:
    make_run(run, NOW, steps=10)
    whole = run.read("metrics.jsonl")
    for cut in (1, 20, 100):
        run.write("metrics.jsonl", whole[:-cut])
        assert (look(run).step, look(run).damage) == (9 if cut > 1 else 10, ())


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "run.json": ("run.json", b'{"attempt": 1', "run.json: damaged"),
    "run.json is a list": ("run.json", b"[1]", "run.json: damaged"),
    "config.yaml": ("config.yaml", b"a: [", "config.yaml: damaged"),
    "config.yaml in no encoding": ("config.yaml", b"\xff\xfe\x00\xd8", "config.yaml: damaged"),
    "a line": (
        "metrics.jsonl",
        lines_of(line(98, NOW)) + b"\0\0\0\n" + lines_of(line(100, NOW)),
        "metrics.jsonl: got",
    ),
    "a marker": ("FAILED", b"", "FAILED: damaged"),
    "a checkpoint": (
        f"checkpoints/{folder_name(90, 1)}/{MANIFEST}",
        b"{}",
        f"{folder_name(90, 1)}/{MANIFEST}: damaged",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_is_named_and_the_rest_is_told(
    run: LocalPlace, name: str, content: bytes, said: str
) -> None:
    make_run(run, NOW, steps=100)
    run.write(name, content)
    found = look(run)
    assert len(found.damage) == 1
    assert said in found.damage[0]
    assert (found.step, found.loss) == (100, 5.0)
    assert found.state == ("failed" if name == "FAILED" else "running")
    assert ("the reason could not be written" in found.note) == (name == "FAILED")
    json.dumps(found.facts(), allow_nan=False)


WRONG = [None, True, -1, 1e400, "x", [], {}, [{}], {"training": 3}, "9" * 9000]


@pytest.mark.parametrize("value", WRONG, ids=[str(value)[:9] for value in WRONG])
def test_values_of_any_kind_end_nothing(run: LocalPlace, value: Any) -> None:
    make_run(run, NOW, marker="PREEMPTED", step=value, reason=value, kind=value)
    facts, config = json.loads(run.read("run.json")), {"watchdog": value, "checkpoint": value, "steps": value}
    run.write("config.yaml", json.dumps(config).encode())
    step = dict.fromkeys(line(1, NOW), value) | {"step": 3}
    run.write("metrics.jsonl", lines_of(step, {"step": value}, line(100, NOW)))
    for marked in (True, False):
        for name in facts:
            run.write("run.json", json.dumps({**facts, name: value}).encode())
            json.dumps(look(run).facts(), allow_nan=False)
        run.write("run.json", json.dumps(facts).encode())
        run.write("metrics.jsonl", lines_of({"step": 2}, step, step | {"step": 4}))
        json.dumps(look(run).facts(), allow_nan=False)
        if marked:
            run.remove("PREEMPTED")


def test_only_the_end_of_the_numbers_is_read(run: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(run, NOW, steps=20_000)
    asked: list[int] = []
    read_into = LocalPlace.read_into

    def counted(place: LocalPlace, name: str, offset: int, buffer: memoryview) -> None:
        asked.append(len(buffer))
        read_into(place, name, offset, buffer)

    monkeypatch.setattr(LocalPlace, "read_into", counted)
    assert look(run).step == 20_000
    assert run.size("metrics.jsonl") > 2_000_000
    assert asked == [65536]


@pytest.mark.parametrize("most", [1, 50, 150, 151, 152, 1000])
def test_a_tail_that_begins_within_a_line_has_the_whole_ones(run: LocalPlace, most: int) -> None:
    run.make()
    content = lines_of(*(line(step, NOW) for step in range(1, 30)))
    run.write("metrics.jsonl", content)
    steps, damage = read_tail(run, most)
    assert [each["step"] for each in steps.lines] == [
        json.loads(each)["step"] for each in content[-most:].split(b"\n")[1:-1]
    ]
    assert not damage


def test_a_file_that_gets_shorter_during_the_look_is_no_error(
    run: LocalPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(run, NOW, steps=10)
    monkeypatch.setattr(LocalPlace, "size", lambda place, name: (place.folder / name).stat().st_size + 500)
    assert (look(run).step, look(run).damage) == (90, ())  # of the checkpoint


def test_what_may_not_be_read_is_named(run: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(run, NOW)

    def refuse(place: LocalPlace, name: str = "", *others: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(place.folder / name))

    for method in ("read", "read_into", "list", "exists"):
        monkeypatch.setattr(LocalPlace, method, refuse)
    damage = look(run).damage
    for name in ("run.json", "config.yaml", "metrics.jsonl", "checkpoints", "DONE"):
        assert f"{name}: Permission denied" in damage
    assert len(set(damage)) == len(damage)


def test_a_run_at_a_url_is_told_by_its_newest_checkpoint() -> None:
    run = open_place(f"memory://{uuid.uuid4()}/base")
    make_run(run, NOW, steps=100, saved=90, rank=ELSEWHERE, quiet=1500.0)
    found = look(run)
    assert (found.state, found.step, found.saved_step) == ("running", 90, 90)  # the next checkpoint is not due
    make_run(run, NOW, steps=100, saved=90, rank=ELSEWHERE, quiet=9000.0)
    assert look(run).state == "stalled"
    make_run(run, NOW, steps=100, saved=90, rank=ELSEWHERE, marker="DONE", step=100)
    assert (look(run).state, look(run).step) == ("done", 100)


@pytest.mark.parametrize("where", ["folder", "url"])
def test_runs_are_found_below_a_folder_but_not_in_runs_nor_through_links(tmp_path: Path, where: str) -> None:
    root = open_place(str(tmp_path) if where == "folder" else f"memory://{uuid.uuid4()}/all")
    for name in ("a", "group/b", "group/deep/c", "group/deep/too/deep/d", "a/e", ".hidden/f"):
        make_run(root / name, NOW, steps=1, saved=None)
    (root / "photos").make()
    root.write("photos/x.jpg", b"")
    root.write("config.yaml", b"{}")
    if root.is_local:
        (tmp_path / "latest").symlink_to(tmp_path / "a")
        (tmp_path / "group" / "around").symlink_to(tmp_path)
    assert ["/".join(found.below) for found in find_runs(root, 3, [])] == ["a", "group/b", "group/deep/c"]
    assert ["/".join(found.below) for found in find_runs(root, 1, [])] == ["a"]
    assert [found.below for found in find_runs(root / "group" / "b", 3, [])] == [()]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(LocalPlace(tmp_path / "a"), NOW)
    (tmp_path / "locked").mkdir()
    names = LocalPlace.list

    def refuse(place: LocalPlace, name: str = "") -> list[str]:
        if place.name == "locked":
            raise PermissionError(13, "Permission denied")
        return names(place, name)

    monkeypatch.setattr(LocalPlace, "list", refuse)
    refused: list[str] = []
    assert [found.below for found in find_runs(LocalPlace(tmp_path), 3, refused)] == [("a",)]
    assert refused == [f"{tmp_path / 'locked'}: Permission denied"]


def test_a_look_loads_no_torch(run: LocalPlace) -> None:
    make_run(run, NOW, marker="DONE")
    program = (
        "import sys\nfrom beit_dist.commands.runs import main\n"
        f"assert main([{str(run)!r}]) == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
