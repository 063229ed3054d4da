"""Killed with -9 again and again, anything at any time, a run ends as if nothing had happened.

Five kills in the tests; as many as ``BEIT_KILLS`` says in ``make soak``.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

KILLS = int(os.environ.get("BEIT_KILLS", "5"))
SEED = int(os.environ.get("BEIT_SEED", "0"))
# Steps of a tenth of a second and a save after every second one: most kills strike while one is written.
SLOW = ["model.width=128", "model.depth=6", "micro_batch=1", "checkpoint.every_steps=2", "logging.every_steps=1"]
LIMIT = 180 + 15 * KILLS  # seconds for one start that runs to the end; a soak may share its machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 120 * KILLS)]


def test_a_run_killed_at_random_times_ends_as_if_nothing_had_happened(new_run: Callable[..., Any]) -> None:
    dice = random.Random(SEED)
    settings = [*SLOW, f"steps={12 + 4 * KILLS}"]
    whole = new_run("whole", ranks=2, overrides=settings)
    code, output = whole.finish(seconds=LIMIT)
    assert code == 0, output

    run = new_run("killed", ranks=2, overrides=settings)
    struck: Counter[str] = Counter()
    orphans: list[int] = []
    try:
        while sum(struck.values()) < KILLS and not (run.folder / "DONE").exists():
            process = run.start()
            before = _newest_attempt(run)
            if not _wait_for_attempt(run, process, before, dice.uniform(0.0, 1.5)):
                continue  # it was done before it could be killed
            target = dice.choice(["a rank", "the launcher", "all"])
            struck[target] += 1
            pids = [rank["pid"] for rank in run.facts()["ranks"]]
            victims = {"a rank": [dice.choice(pids)], "the launcher": [process.pid], "all": [process.pid, *pids]}
            children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            for pid in victims[target]:
                _kill(pid)
            if target == "a rank":
                process.communicate(timeout=LIMIT)  # the launcher ends the other rank
            else:
                orphans += children  # they run on, beside the next attempt, until they are superseded
                process.kill()
                process.communicate()
        code, output = run.finish(seconds=LIMIT)
        assert code == 0, output
    finally:
        for pid in orphans:
            _kill(pid)
    assert run.numbers() == whole.numbers()
    assert run.final_files() == whole.final_files()
    assert Counter(line["step"] for line in run.lines()) == Counter(range(1, 13 + 4 * KILLS))
    assert (run.folder / "DONE").exists()
    assert not (run.folder / "FAILED").exists()
    _no_stray_folder_is_left(run.folder / "checkpoints")


def _newest_attempt(run: Any) -> int:
    attempts = run.folder / "checkpoints" / "attempts"
    return max((int(path.name) for path in attempts.glob("*")), default=0) if attempts.exists() else 0


def _wait_for_attempt(run: Any, process: subprocess.Popen[str], before: int, delay: float) -> bool:
    """Wait until a new attempt has recorded a step, and ``delay`` seconds more; False if it ended first."""
    deadline = time.monotonic() + 120
    while not any(line["attempt"] > before for line in run.lines()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.communicate()
            return False
        time.sleep(0.01)
    time.sleep(delay)
    return process.poll() is None


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _no_stray_folder_is_left(checkpoints: Path) -> None:
    folders = list(checkpoints.glob("step-*"))
    assert all((folder / "manifest.json").exists() for folder in folders)
    assert not list(checkpoints.rglob("*.tmp"))
    assert len(folders) == 2  # checkpoint.keep
