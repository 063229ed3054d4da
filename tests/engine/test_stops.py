"""Stopped in every way and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.processes import members

from beit_dist.engine.ranks.preemption import StopRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
# The second measurement of the held-out loss, after step 20, waits until the ranks have been asked to stop.
EVALUATING = f"""\
import os, pathlib, runpy, time
from beit_dist.tasks.pretraining.validation import Validation
measure, calls = Validation.measure, []
def measuring(self, model):
    calls.append(None)
    stop = self._around.stop
    def waiting(*inputs):
        pathlib.Path("evaluating-" + os.environ["RANK"]).touch()
        while len(calls) == 2 and not stop.known: time.sleep(0.01)
        return model(*inputs)
    return measure(self, waiting)
Validation.measure = measuring
runpy.run_path({str(TRAIN)!r}, run_name='__main__')
"""
# Step 30 waits until rank 0 has been told to stop, and rank 0 writes no checkpoint after it.
SAVING = f"""\
import os, pathlib, runpy, time
from beit_dist.engine.checkpoint import writing as saves
from beit_dist.engine.ranks.preemption import StopRequest
from beit_dist.engine.record import Recorder
add, write, note = Recorder.add, saves.write_fragments, StopRequest._note
def noting(self, *signal):
    note(self, *signal)
    pathlib.Path("told").touch()
def waiting(self, facts, *rest):
    if facts.number == 30: pathlib.Path("at-30").touch()
    while facts.number == 30 and not pathlib.Path("told").exists(): time.sleep(0.01)
    return add(self, facts, *rest)
def writing(folder, rank, fragments):
    if rank == 0 and folder.name > "step-00000030":
        pathlib.Path("saving").touch()
        time.sleep(600)
    write(folder, rank, fragments)
Recorder.add, saves.write_fragments, StopRequest._note = waiting, writing, noting
runpy.run_path({str(TRAIN)!r}, run_name='__main__')
"""


def until(
    condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            pytest.fail(f"it did not come to that: {process.communicate()[0] if process else ''}")
        time.sleep(0.02)


def manifests(run: Any, step: int) -> list[Path]:
    return list(run.folder.glob(f"checkpoints/step-{step:08d}.*/manifest.json"))


def test_a_run_stopped_in_every_way_ends_as_if_nothing_had_happened(
    new_run: Callable[..., Any], make_shards: Callable[..., Any], tmp_path: Path
) -> None:
    make_shards(tmp_path / "held_out", [20], seed=3)
    settings = [f"validation.data={tmp_path / 'held_out'}", "validation.every_steps=10"]
    whole = new_run("whole", ranks=2, overrides=settings)
    code, output = whole.finish()
    assert code == 0, output
    assert (whole.folder / "DONE").exists()
    losses = [line["loss"] for line in whole.lines()]
    assert losses[0] == pytest.approx(math.log(64), rel=0.01)
    assert len(losses) == math.ceil(5 * 147 / 16)

    run = new_run("run", ranks=2, overrides=settings, deepspeed=True)
    _interrupted_while_evaluating(run)
    _told_twice_while_saving(run)

    run.entry, run.deepspeed = TRAIN, False
    code, output = run.signal_at(34, signal.SIGTERM, rank=1)
    assert code == 0, output
    assert "resumed from step-00000028.a0002" in output
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert 34 <= stopped["step"] < 46
    assert stopped["reason"] == "SIGTERM"
    assert len(run.lines()) == stopped["step"]

    code, output = run.finish()
    assert code == 0, output
    assert f"step {stopped['step']}" in output
    assert (run.folder / "DONE").exists()
    assert not (run.folder / "PREEMPTED").exists()
    assert {line["attempt"] for line in run.lines()} == {1, 2, 3, 4}
    assert run.numbers() == whole.numbers()
    assert run.final_files() == whole.final_files()
    results = [
        [(line["step"], line["loss"]) for line in map(json.loads, (one.folder / "validation.jsonl").open())]
        for one in (run, whole)
    ]
    assert results[0] == results[1]  # the one that was cut short was made up for

    code, output = run.finish()
    assert code == 0, output
    assert "nothing left to do" in output
    assert run.numbers() == whole.numbers()


def test_ctrl_c_that_also_ends_what_reads_the_output_still_saves(new_run: Callable[..., Any]) -> None:
    """As with ``| tee log``, which the same Ctrl-C ends at once."""
    run = new_run("run", overrides=["loader.workers=0", "steps=4000", "checkpoint.every_steps=null"])
    process = run.start()
    until(lambda: len(run.lines()) >= 3, process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert len(manifests(run, stopped["step"])) == 1
    assert not (run.folder / "FAILED").exists()


def _interrupted_while_evaluating(run: Any) -> None:
    """Ctrl-C in a terminal: SIGINT to the launcher, the ranks and their workers, which ignore it."""
    run.entry = run.folder.parent / "evaluating.py"
    run.entry.write_text(EVALUATING)
    process = run.start(start_new_session=True)
    until(lambda: any(line["step"] == 20 for line in run.lines()), process)
    for rank in (0, 1):
        until((run.folder.parent / f"evaluating-{rank}").exists, process)
    assert len(members(process.pid)) >= 6  # two of the launcher, the ranks, and a worker of each
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    until(lambda: not members(process.pid))
    stopped = json.loads((run.folder / "PREEMPTED").read_text())
    assert (stopped["step"], stopped["reason"]) == (20, "SIGINT"), output
    assert len(run.lines()) == 20
    assert len(manifests(run, 20)) == 1
    assert not (run.folder / "FAILED").exists()
    assert "loader worker" not in output


def _told_twice_while_saving(run: Any) -> None:
    """SIGTERM to what starts the ranks, which tells one after the other; rank 0 is told again while it saves."""
    run.entry = run.folder.parent / "saving.py"
    run.entry.write_text(SAVING)
    process = run.start(start_new_session=True)
    until((run.folder.parent / "at-30").exists, process)
    (node,) = psutil.Process(process.pid).children()
    rank_0 = psutil.Process(run.facts()["ranks"][0]["pid"])
    node.terminate()
    until((run.folder.parent / "told").exists, process)
    told = time.monotonic()
    until((run.folder.parent / "saving").exists, process)
    time.sleep(max(0.0, StopRequest()._grace + 0.5 - (time.monotonic() - told)))
    rank_0.terminate()
    output, _ = process.communicate(timeout=120)
    until(lambda: not members(process.pid))
    assert process.returncode != 0, output
    assert not (run.folder / "PREEMPTED").exists()
    assert len(manifests(run, 28)) == 1
    assert not any(manifests(run, step) for step in range(29, 46))
