"""The job is recorded once, and read when it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit_dist.errors import DataError
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing import job as jobs
from beit_dist.tokenizing.job import Job, read_job, record_job

JOB = Job("b" * 64, "a" * 64, 64, 32, 8, 2, 4, 0, "random", 3, "fp32", "cpu", "2.0", "11.0", "1.26")


@pytest.mark.parametrize("written", [0, 100])
def test_a_job_that_another_worker_is_just_writing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """As where the file system has no hard links, and files have their names before their content."""
    path = tmp_path / "job.json"
    path.write_bytes(JOB.to_bytes()[:written])
    monkeypatch.setattr(jobs.time, "sleep", lambda _: path.write_bytes(JOB.to_bytes()))
    record_job(LocalPlace(tmp_path), JOB)
    assert read_job(LocalPlace(tmp_path)) == JOB


def test_a_job_whose_worker_died_while_it_wrote_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.json").touch()
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"job\.json: got 0 bytes, cut short.* Remove it, and run"):
        record_job(LocalPlace(tmp_path), JOB)
