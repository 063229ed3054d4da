"""The shell scripts and the Dockerfile pass the linters of their languages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.programs import program

REPOSITORY = Path(__file__).resolve().parents[2]


def shell_scripts() -> list[str]:
    """Every shell script of the repository, by its first line or its suffix."""
    folders = ("cluster", ".ci", "tests", "tools")
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*")) if path.is_file()]
    return [
        str(path.relative_to(REPOSITORY))
        for path in files
        if path.suffix == ".sh" or path.read_bytes().partition(b"\n")[0].endswith((b"bash", b"/sh"))
    ]


def test_the_scripts_are_found() -> None:
    expected = {".ci/run", "cluster/slurm/pretrain.sbatch", "cluster/kubernetes/base/entry.sh"}
    expected |= {"cluster/slurm/job.sh", "cluster/slurm/pipeline.sh", "cluster/slurm/site.sh.example"}
    assert expected <= set(shell_scripts())


@pytest.mark.parametrize("script", shell_scripts())
def test_shellcheck_finds_nothing(script: str) -> None:
    command = [program("shellcheck"), script]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_hadolint_finds_nothing() -> None:
    command = [program("hadolint"), "cluster/Dockerfile"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
