"""The job is recorded once, and read when it is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from beit_dist.errors import ConfigError, DataError
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


def test_a_job_as_all_jobs_were_is_written_as_it_always_was() -> None:
    """So commits of earlier versions, which hold its digest, belong to it."""
    assert list(json.loads(JOB.to_bytes())) == [
        *("images", "tokenizer", "vocabulary", "image_size", "patch_size", "views", "shard_samples", "seed"),
        *("augment", "batch", "precision", "device", "torch", "pillow", "numpy"),
    ]
    assert JOB.digest == "a2fb20ff7cdd70ec64a76ec8ce58376272879f19d936f69cdc91a8915ca8c3a8"


@pytest.mark.parametrize(
    ("name", "value"),
    [("pixel_version", 2), ("decoder", "simplejpeg 1.9.0"), ("compiled", True), ("crop_area", 0.5)],
)
def test_what_is_made_otherwise_is_another_job(tmp_path: Path, name: str, value: object) -> None:
    other = replace(JOB, **{name: value})  # type: ignore[arg-type]
    assert json.loads(other.to_bytes())[name] == value
    assert other.digest != JOB.digest
    record_job(LocalPlace(tmp_path), other)
    assert read_job(LocalPlace(tmp_path)) == other
    with pytest.raises(DataError, match=f"{name}: got "):
        record_job(LocalPlace(tmp_path), JOB)


@pytest.mark.parametrize("area", [0.0, -0.1, 1.5])
def test_a_crop_takes_a_share_of_the_area(area: float) -> None:
    with pytest.raises(ConfigError, match=r"--crop-area: got .*, expected a share above 0 and at most 1"):
        replace(JOB, crop_area=area)


def test_there_is_no_third_version_of_the_pixels() -> None:
    with pytest.raises(ConfigError, match="--pixel-version: got 3, expected 1 or 2"):
        replace(JOB, pixel_version=3)  # type: ignore[arg-type]
