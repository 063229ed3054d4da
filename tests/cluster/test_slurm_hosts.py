"""A job whose hosts fail: one is cut off from the network and returns, another loses its power."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import left_of, living
from support.slurm import Slurm
from support.slurm_jobs import Job, assert_untold, frozen, lines, numbers, tensors, uninterrupted

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


def saved(run: Path, attempt: int) -> list[Path]:
    """The committed checkpoints of an attempt."""
    return list(run.glob(f"checkpoints/step-*.a{attempt:04d}/manifest.json"))


def state(run: Path) -> tuple[Any, ...]:
    """What a stale rank could spoil."""
    markers = [marker for marker in ("DONE", "PREEMPTED", "FAILED") if (run / marker).exists()]
    checkpoints = sorted(str(path) for path in run.glob("checkpoints/step-*/*"))
    return markers, checkpoints, (run / "run.json").read_text(), (run / "metrics.jsonl").read_text()


def test_a_job_outlives_its_hosts(slurm_hosts: Slurm, tmp_path: Path, make_shards: Callable[..., Any]) -> None:
    slurm, networks = slurm_hosts, slurm_hosts.networks
    assert networks is not None
    make_shards(tmp_path / "shards", [50, 64, 33], views=2)
    whole = uninterrupted(tmp_path)

    job = Job(slurm, tmp_path / "run", "checkpoint.every_steps=4")
    job.until(lambda: saved(job.run, 1))
    assert job.facts["NodeList"] == "n[0-1]"
    (stale,) = slurm.processes("n0")
    networks.cut("n0")  # where the script and rank 0 run; it still reaches the run folder
    job.until_step(attempt=2, count=1)
    assert job.facts["NodeList"] == "n[1-2]"
    job.until(lambda: saved(job.run, 2))
    restarted = [*slurm.processes("n1"), *slurm.processes("n2")]
    assert len(restarted) == 2
    with frozen(restarted):
        before = state(job.run)
        (target,) = (tmp_path / "targets" / "train").iterdir()
        assert "n1:" in target.read_text()
        assert living([stale]), "else it could do no harm"
        networks.mend("n0")
        assert not left_of([stale], seconds=240)
        job.until(lambda: slurm.state("n0") == "idle")  # the script has ended there too
        for was, now in zip(before, state(job.run), strict=True):
            assert now == was
        assert "n1:" in target.read_text(), "the target is the restart's"
        assert (job.facts["JobState"], job.facts["Restarts"]) == ("RUNNING", "1")

    slurm.kill("n2")
    job.until_step(attempt=3, count=1)
    assert job.facts["NodeList"] == "n[0-1]"
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "2"), job.output

    assert json.loads((job.run / "run.json").read_text())["attempt"] == 3
    assert {line["attempt"] for line in lines(job.run)} == {1, 2, 3}
    assert (job.run / "DONE").exists()
    assert not any((job.run / marker).exists() for marker in ("PREEMPTED", "FAILED"))
    assert numbers(job.run) == numbers(whole)
    assert tensors(job.run) == tensors(whole)
    assert not list((tmp_path / "targets").rglob("*.json*"))
    assert_untold(tmp_path)
