"""A run that is started again and again without coming further is refused; one that comes further never is."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.engine import launch
from beit_dist.engine.checkpoint.attempts import Attempts
from beit_dist.engine.launch import failures_marked
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.timeouts import Timeouts
from beit_dist.engine.run_folder import RunFolder
from beit_dist.storage.local import LocalPlace

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
# Rank 0 is killed at a step of the file `fault`, once the checkpoint of the step named behind it is there.
ENTRY = f"""\
import os, pathlib, runpy, signal, time
from beit_dist.engine.record import Recorder
add = Recorder.add
def killed(self, facts, *rest):
    step, saved = (int(word) for word in pathlib.Path("fault").read_text().split())
    while step == facts.number:
        if not saved or list(pathlib.Path("run/checkpoints").glob(f"step-{{saved:08d}}.*/manifest.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
    return add(self, facts, *rest)
Recorder.add = killed
runpy.run_path({str(TRAIN)!r}, run_name='__main__')
"""


def attempts(folder: Path) -> int:
    return Attempts(LocalPlace(folder / "checkpoints")).newest()


@pytest.mark.slow
def test_starts_that_make_no_checkpoint_are_refused_in_the_end(
    new_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = new_run("run", overrides=["steps=20", "max_fruitless_starts=2"])  # a checkpoint after every 7 steps
    run.entry, fault = tmp_path / "entry.py", tmp_path / "fault"
    run.entry.write_text(ENTRY)
    for fault_at in ("9 7", "8 0", "13 0"):  # the first comes to step 7, the others not beyond it
        fault.write_text(fault_at)
        assert run.finish()[0] not in (0, 2)
    code, output = run.finish()
    assert code == 2, output
    assert "(2: attempts 2 to 3) made no checkpoint beyond step 7, so this one is refused" in output
    assert output.count("error:") == 1
    assert attempts(run.folder) == 3, "it has begun nothing"
    assert run.finish("--dry-run")[0] == 2

    fault.write_text("15 14")
    assert run.finish("max_fruitless_starts=null")[0] not in (0, 2)
    fault.write_text("0 0")
    assert run.finish()[0] == 0, "the count begins anew"
    for _ in range(3):
        code, output = run.finish()
        assert (code, "nothing left to do" in output) == (0, True), output


@pytest.mark.slow
def test_a_start_that_was_stopped_after_a_step_never_counts(new_run: Callable[..., Any]) -> None:
    run = new_run("run", overrides=["steps=60", "max_fruitless_starts=1", "checkpoint.every_steps=null"])
    for step in (1, 5, 9):
        code, output = run.signal_at(step, signal.SIGTERM)
        assert code == 0, output
        assert "checkpoint saved" in output
    assert run.finish()[0] == 0


def test_attempts_count_from_the_last_that_was_followed_by_a_checkpoint(tmp_path: Path) -> None:
    begun = Attempts(LocalPlace(tmp_path))
    assert begun.fruitless(0, 5) == 0
    for step in (0, 0, 40, 40, 40):
        attempt = Attempts(LocalPlace(tmp_path))
        attempt.begin(step=step)
    assert begun.fruitless(40, 5) == 3
    assert begun.fruitless(40, 2) == 2
    assert begun.fruitless(41, 5) == 0
    assert begun.fruitless(0, 9) == 5
    begun.begin()  # as by an older version
    assert begun.fruitless(40, 5) == 0


def test_a_rank_that_fails_in_a_folder_that_is_another_starts_leaves_no_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(launch, "_end", lambda message, code: (print(message), codes.append(code), _raise())[0])
    run, store = RunFolder(tmp_path), Attempts(LocalPlace(tmp_path / "checkpoints"))
    run.create()
    store.begin()
    run.begun, run.attempt = True, store.number
    timeouts = Timeouts.__new__(Timeouts)
    monkeypatch.setattr(Timeouts, "now", "timeouts.step_minutes=15")

    def fails() -> None:
        with pytest.raises(SystemExit), failures_marked(run, Ranks(1, 2, 1), timeouts, time.time()):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")

    Attempts(LocalPlace(tmp_path / "checkpoints")).begin()
    fails()
    assert "superseded by attempt 2: this run (attempt 1) stops" in capsys.readouterr().out
    assert not (tmp_path / "FAILED").exists()
    run.attempt = 2
    fails()
    assert json.loads((tmp_path / "FAILED").read_text())["rank"] == 1
    assert codes == [1, 1]


def _raise() -> None:
    raise SystemExit
