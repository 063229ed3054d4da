"""The batch script on a real SLURM of two nodes; the long tests are those of ``make cluster-test``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.slurm import Slurm
from support.slurm_jobs import Job, assert_untold, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_job_trains_on_two_nodes(slurm: Slurm, tmp_path: Path, make_shards: Callable[..., Any]) -> None:
    make_shards(tmp_path / "shards", [50, 64, 33], views=2)
    job = Job(slurm, tmp_path / "run", "steps=3", "optimizer.warmup_steps=1")
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.output
    assert (tmp_path / "run" / "DONE").exists()
    assert len(lines(tmp_path / "run")) == 3
    assert not list((tmp_path / "targets").rglob("*.json*"))
    assert_untold(tmp_path)
