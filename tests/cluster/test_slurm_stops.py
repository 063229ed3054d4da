"""Jobs that a real SLURM stops, puts back and cancels, and those that must not run."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import left_of
from support.slurm import Slurm
from support.slurm_jobs import Job, assert_untold, awaits, frozen, lines, numbers, tensors, uninterrupted

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def folder(tmp_path: Path, make_shards: Callable[..., Any]) -> Path:
    """With shards in it."""
    make_shards(tmp_path / "shards", [50, 64, 33], views=2)
    return tmp_path


def test_a_run_that_is_stopped_in_every_way_ends_as_if_nothing_had_happened(slurm: Slurm, folder: Path) -> None:
    whole = uninterrupted(folder)
    job = Job(slurm, folder / "broken")
    job.until_step(attempt=1, count=5)
    (target,) = (folder / "targets" / "train").iterdir()
    assert json.loads(target.read_text())[0]["labels"] == {"run": "broken", "slurm_job_id": job.number}
    assert_untold(folder)

    # The time limit comes near: SIGUSR1 to the script, which SLURM sends within half a minute from now.
    minutes = math.ceil(_seconds(job.facts["RunTime"]) / 60) + 2
    with frozen(ranks := job.ranks()):
        assert len(ranks) == 2
        slurm("scontrol", "update", f"jobid={job.number}", f"TimeLimit={minutes}")
        job.until(lambda: all(awaits(rank, signal.SIGUSR1) for rank in ranks))
        slurm("scontrol", "update", f"jobid={job.number}", "TimeLimit=30")  # or the restart is stopped as well
    stops = [job.stopped()]
    job.until_step(attempt=2, count=5)
    assert job.facts["Restarts"] == "1"

    # Another job wants the same run folder.
    other = Job(slurm, folder / "broken")
    assert (other.ended()["JobState"], other.facts["ExitCode"]) == ("FAILED", "2:0"), other.output
    assert f"belongs to job {job.number} (beit RUNNING)" in other.output

    # An operator puts it back: SIGTERM to script and ranks, and SIGKILL when the time is over.
    slurm("scontrol", "requeue", job.number)
    stops.append(job.stopped())
    job.until_step(attempt=3, count=5)
    # A partition with precedence takes its nodes.
    first = slurm("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true").strip()
    stops.append(job.stopped())
    job.until_step(attempt=4, count=5)
    assert slurm.job(first)["JobState"] == "COMPLETED"
    assert job.facts["Restarts"] == "3", job.output

    slurm("scancel", job.number)
    stops.append(job.stopped())
    assert job.ended()["JobState"] == "CANCELLED"
    job.until(lambda: slurm.idle)
    assert job.facts["JobState"] == "CANCELLED", "it must not come back by itself"

    said = job.output
    assert said.count("stopped on request") == 4, said
    job = Job(slurm, folder / "broken")
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), job.output
    said += job.output
    for attempt, step in enumerate(stops, 1):
        assert f"resumed from step-{step:08d}.a{attempt:04d}" in said or f"step-{step:08d}.a{attempt:04d}" in said
    assert stops == sorted(set(stops))
    assert "Traceback" not in said
    assert (job.run / "DONE").exists()
    assert not any((job.run / marker).exists() for marker in ("PREEMPTED", "FAILED"))
    assert len(lines(job.run)) == 80
    assert numbers(job.run) == numbers(whole)
    assert tensors(job.run) == tensors(whole)
    assert not left_of(job.ranks(), seconds=30)
    assert not list((folder / "targets").rglob("*.json*"))
    assert_untold(folder)


def test_a_job_that_never_comes_to_a_step_is_stopped(slurm: Slurm, folder: Path) -> None:
    job = Job(slurm, folder / "run", "max_minutes=0.0001", "max_fruitless_starts=1")
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "1"), job.output
    assert "stopped on request, before the first step of this start" in job.output
    assert "made no checkpoint beyond step 0, so this one is refused" in job.output
    assert "failed with exit code 2 and not requeued" in job.output


def test_a_host_that_is_not_fit_is_named_and_the_ranks_do_not_start(slurm: Slurm, folder: Path) -> None:
    python = folder / "python"
    unfit = '[ "$SLURMD_NODENAME" = n1 ] && export MASTER_ADDR=nowhere.invalid'
    python.write_text(f'#!/bin/sh\n{unfit}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = Job(slurm, folder / "run", PYTHON=str(python))
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), job.output
    (line,) = [line for line in job.output.splitlines() if "preflight: host" in line]
    assert "preflight: host n1: MASTER_ADDR: nowhere.invalid, where the ranks are to meet, cannot be" in line
    assert "sbatch --exclude=HOST" in job.output
    assert not (folder / "run" / "checkpoints").exists()
    assert_untold(folder)


def _seconds(time: str) -> int:
    """Of ``[DAYS-]HH:MM:SS``, below a day."""
    hours, minutes, seconds = (int(part) for part in time.split(":"))
    return 3600 * hours + 60 * minutes + seconds
