"""``cluster/slurm/pipeline.sh`` with a small program in the place of ``sbatch``."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "slurm"

# Notes its arguments and some variables, and prints a number, with the name of a cluster.
SBATCH = """#!/usr/bin/env bash
[[ " $* " == *" --job-name=beit-$REFUSED "* ]] && { echo 'sbatch: error: no' >&2; exit 1; }
{ printf '%q ' BEIT_WORKERS="$BEIT_WORKERS" RUN="$RUN" BEIT_NEEDS="${BEIT_NEEDS:-}" -- "$@"; echo; } >> submitted
echo "$((100 + $(wc -l < submitted)));cluster"
"""


SQUEUE = """#!/usr/bin/env bash
cat queue
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to submit from."""
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue").touch()
    return tmp_path


def pipeline(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "RUN": "runs/mine", "REFUSED": "none", **settings}
    command = ["bash", str(FOLDER / "pipeline.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def submitted(folder: Path) -> dict[str, list[str]]:
    """The jobs by name: variables, ``--`` and what sbatch got."""
    path = folder / "submitted"
    lines = [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {next(word[16:] for word in line if word.startswith("--job-name=beit-")): line for line in lines}


def dependencies(jobs: dict[str, list[str]]) -> list[str | None]:
    """The numbers that the jobs wait for."""
    starts = "--dependency=afterok:"
    return [
        next((word.removeprefix(starts) for word in job if word.startswith(starts)), None) for job in jobs.values()
    ]


def test_each_step_waits_for_the_success_of_the_one_before(folder: Path) -> None:
    images = {"IMAGES": "my photos", "BEIT_WORKERS": "64", "PRETRAIN_SBATCH": "--nodes=16 --time=10"}
    found = pipeline(folder, "steps=10", "--", "--views", "4", **images)
    assert found.returncode == 0, found.stderr
    jobs = submitted(folder)
    assert [*jobs] == ["freeze", "tokenize", "finish", "pretrain", "export"]
    assert dependencies(jobs) == [None, "101", "102", "103", "104"]
    for name, job in jobs.items():
        assert job[:2] == ["BEIT_WORKERS=64", "RUN=runs/mine"]
        assert ("--kill-on-invalid-dep=yes" in job) == (name != "freeze"), "it would wait for ever"
        assert job[2] == ("BEIT_NEEDS=runs/mine/DONE" if name == "export" else "BEIT_NEEDS=")
    assert jobs["freeze"][-6:] == ["my photos", "--out", "shards", "--views", "4", "--index-only"]
    assert "--array=0-63" in jobs["tokenize"]
    assert jobs["tokenize"][-3:] == [str(FOLDER / "tokenize.sbatch"), "--views", "4"]
    assert jobs["finish"][-3:] == ["--views", "4", "--finish"]
    assert jobs["pretrain"][-4:] == ["--nodes=16", "--time=10", str(FOLDER / "pretrain.sbatch"), "steps=10"]
    assert jobs["export"][-6:] == ["export", "runs/mine", "--to", "safetensors", "--out", "runs/mine/exported"]


def test_dry_run_prints_what_would_be_submitted_and_submits_nothing(folder: Path) -> None:
    found = pipeline(folder, "--dry-run", "steps=10", IMAGES="my photos", AWS_SECRET_ACCESS_KEY="hunter2-of-tests")
    assert found.returncode == 0, found.stderr
    assert not (folder / "submitted").exists()
    assert "hunter2-of-tests" not in found.stdout + found.stderr
    assert pipeline(folder, "steps=10", IMAGES="my photos").returncode == 0
    lines = [shlex.split(line) for line in found.stdout.splitlines()]
    real = [job[job.index("--") + 1 :] for job in submitted(folder).values()]
    assert [line[0] for line in lines] == ["sbatch"] * 5
    names = {f"{101 + index}": name for index, name in enumerate(("FREEZE", "TOKENIZE", "FINISH", "PRETRAIN"))}
    for line, job in zip(lines, real, strict=True):
        expected = [
            f"--dependency=afterok:{names[word[-3:]]}" if word.startswith("--dependency") else word for word in job
        ]
        assert line[1:] == expected


@pytest.mark.parametrize(
    ("there", "left"),
    [
        ([], ["freeze", "tokenize", "finish", "pretrain", "export"]),
        (["shards/sources.jsonl"], ["tokenize", "finish", "pretrain", "export"]),
        (["shards/manifest.json"], ["pretrain", "export"]),
        (["shards/sources.jsonl", "shards/manifest.json", "runs/mine/DONE"], ["export"]),
        (["shards/manifest.json", "runs/mine/DONE", "runs/mine/exported/model.safetensors"], []),
        # Of a run that has been trained further since.
        (["shards/manifest.json", "runs/mine/exported/model.safetensors"], ["pretrain", "export"]),
        (["runs/mine/DONE"], ["freeze", "tokenize", "finish", "pretrain", "export"]),
    ],
)
def test_steps_whose_results_are_there_are_left_out(folder: Path, there: list[str], left: list[str]) -> None:
    for name in there:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert pipeline(folder).returncode == 0
    assert [*submitted(folder)] == left
    assert (
        dependencies(submitted(folder))
        == [None, *(str(101 + index) for index in range(len(left) - 1))][: len(left)]
    )


def test_a_second_one_in_the_same_run_folder_is_refused_while_a_job_of_the_first_is_left(folder: Path) -> None:
    assert pipeline(folder).returncode == 0
    assert (folder / "runs" / "mine" / "slurm-jobs").read_text().split() == ["101", "102", "103", "104", "105"]
    (folder / "queue").write_text("77 other RUNNING\n104 beit-pretrain PENDING\n")
    found = pipeline(folder)
    assert found.returncode == 2
    assert "error: RUN: runs/mine belongs to job 104 (beit-pretrain PENDING). Wait for its end" in found.stderr
    assert len(submitted(folder)) == 5
    assert pipeline(folder, RUN="runs/another").returncode == 0
    (folder / "queue").write_text("77 other RUNNING\n")
    assert pipeline(folder).returncode == 0


def test_a_refused_job_ends_it(folder: Path) -> None:
    found = pipeline(folder, REFUSED="tokenize")
    assert found.returncode != 0
    assert [*submitted(folder)] == ["freeze"]


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        (["--views", "4"], {}, "got '--views'"),
        (["steps"], {}, "got 'steps'"),
        ([], {"BEIT_WORKERS": "0"}, "BEIT_WORKERS: got '0'"),
        ([], {"RUN": "s3://runs/mine"}, "RUN: got 's3://runs/mine'"),
    ],
)
def test_wrong_input_is_refused(folder: Path, arguments: list[str], settings: dict[str, str], says: str) -> None:
    found = pipeline(folder, *arguments, **settings)
    assert found.returncode == 2
    assert says in found.stderr
    assert not (folder / "submitted").exists()
