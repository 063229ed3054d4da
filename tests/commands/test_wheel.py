"""A wheel holds all that the commands need: it runs far from the checkout, and finds recipes by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.reported import make_run, steps_of

from beit_dist import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of a wheel, built from a copy as setuptools leaves files in the source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("beit_dist", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-cache-dir",
    ]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def beit(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "beit_dist", *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--config", "beit_small", "--ds_config", "zero1", "run=r", "--dry-run"], "ZeRO stage 1"),
        (["tokenizer", "--config", "tokenizer_small", "--out", "t", "--dry-run"], "dVAE of 1,024 tokens"),
        (["bench", "masks", "--quick", "--json", "-"], '"bench": "masks"'),
    ],
)
def test_a_wheel_finds_its_recipes_by_name(installed: Path, tmp_path: Path, words: list[str], shown: str) -> None:
    done = beit(installed, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_has_the_templates_of_reports(installed: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=steps_of(3))
    done = beit(installed, tmp_path, "report", str(run), "--out", "page.html")
    assert done.returncode == 0, done.stderr
    assert "</html>" in (tmp_path / "page.html").read_text()


def test_a_wheel_is_what_runs_and_has_the_command_beit(installed: Path, tmp_path: Path) -> None:
    assert beit(installed, tmp_path, "--version").stdout == f"beit_dist {__version__}\n"
    assert "the name of a recipe: beit_base, " in beit(installed, tmp_path, "train", "--config", "x").stderr
    entry_points = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "beit = beit_dist.commands.main:start" in entry_points
    assert (installed / "beit_dist" / "recipes" / "deepspeed" / "zero1.json").read_bytes() == (
        ROOT / "configs" / "deepspeed" / "zero1.json"
    ).read_bytes()
    program = "import beit_dist; print(beit_dist.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(installed)
