"""A run folder started twice at once: the newer start goes on, the older stops, says why, and harms nothing."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
SETTINGS = ["loader.workers=0", "steps=20", "checkpoint.every_steps=2"]
# Rank 0 of attempt 1 is stopped, as on a host that hangs, between its last look at the attempts and the commit of
# step 6. Attempt 2 trains, but does not end before a third has begun beside it.
ENTRY = f"""\
import pathlib, runpy, signal, threading, time
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.record import Recorder
commit, check, add = CheckpointStore.commit, CheckpointStore.refuse_if_superseded, Recorder.add
def committing(self, folder, *rest):
    self.stops = folder.name == "step-00000006.a0001"
    commit(self, folder, *rest)
def checking(self):
    check(self)
    if getattr(self, "stops", False):
        self.stops = False
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # stops here, not a little later
def waiting(self, facts, *rest):
    third = pathlib.Path("run/checkpoints/attempts/000003")
    while self._scope.attempt == 2 and facts.number == 10 and not third.exists():
        time.sleep(0.02)
    return add(self, facts, *rest)
CheckpointStore.commit, CheckpointStore.refuse_if_superseded, Recorder.add = committing, checking, waiting
runpy.run_path({str(TRAIN)!r}, run_name='__main__')
"""


def until(condition: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def files_of(checkpoints: Path, attempt: int) -> dict[str, str]:
    """sha256 of each file of an attempt's committed checkpoints."""
    manifests = sorted(checkpoints.glob(f"step-*.a{attempt:04d}/manifest.json"))
    files = [file for manifest in manifests for file in sorted(manifest.parent.iterdir())]
    return {str(file.relative_to(checkpoints)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_newer_start_goes_on_and_the_older_stops_by_itself(new_run: Callable[..., Any]) -> None:
    whole = new_run("whole", ranks=2, overrides=SETTINGS)
    code, output = whole.finish()
    assert code == 0, output

    run = new_run("run", ranks=2, overrides=SETTINGS)
    run.entry = run.folder.parent / "entry.py"
    run.entry.write_text(ENTRY)
    checkpoints = run.folder / "checkpoints"
    logs: list[Path] = []
    ranks: list[psutil.Process] = []
    processes: list[Any] = []

    def start() -> Any:
        logs.append(run.folder.parent / f"{len(logs) + 1}.log")
        with logs[-1].open("w") as log:
            processes.append(run.start(stdout=log))
        return processes[-1]

    def ranks_of(attempt: int) -> list[psutil.Process]:
        until(lambda: (run.folder / "run.json").exists() and run.facts()["attempt"] == attempt)
        ranks.extend(psutil.Process(rank["pid"]) for rank in run.facts()["ranks"])
        return ranks[-2:]

    def ended(attempt: int) -> str:
        """It has stopped by itself, all ranks of it have said why, and it has left no marker."""
        text = f"superseded by attempt {attempt + 1}: this run (attempt {attempt}) stops"
        assert processes[attempt - 1].wait(timeout=240) == 1
        said = logs[attempt - 1].read_text()
        assert all(f"rank {rank} on" in line for rank, line in enumerate(sorted(lines(said, text)))), said
        assert len(lines(said, text)) == 2, said
        assert "Traceback" not in said
        assert not any((run.folder / marker).exists() for marker in ("FAILED", "PREEMPTED"))
        return said

    try:
        start()
        stopped = ranks_of(1)[0]
        until(lambda: stopped.status() == psutil.STATUS_STOPPED)
        assert not (checkpoints / "step-00000006.a0001" / "manifest.json").exists()
        assert {file.name for file in (checkpoints / "step-00000006.a0001").glob("rank-*.json")} == {
            "rank-00000.json", "rank-00001.json"
        }  # fmt: skip

        start()
        ranks_of(2)
        until(lambda: any(line["step"] == 9 for line in run.lines()))
        until(lambda: len(files_of(checkpoints, 2)) == 10)  # two checkpoints
        before, facts, lines_before = files_of(checkpoints, 2), run.facts(), run.lines()
        stopped.resume()
        ended(1)
        assert not list(checkpoints.glob("step-00000006.a0001"))
        assert files_of(checkpoints, 2) == before
        assert run.facts() == facts
        assert run.lines() == lines_before
        assert processes[1].poll() is None

        assert start().wait(timeout=240) == 0, logs[2].read_text()
        ended(2)
    finally:
        for process in [*(process for process in processes if process.poll() is None), *ranks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert "resumed from step-00000004.a0001" in logs[1].read_text()
    assert (run.folder / "DONE").exists()
    assert run.facts()["attempt"] == 3
    assert {line["attempt"] for line in run.lines()} == {1, 2, 3}
    assert run.numbers() == whole.numbers()
    assert run.final_files() == whole.final_files()


def lines(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]
