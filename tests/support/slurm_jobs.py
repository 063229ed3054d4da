"""A small training under the batch script of a test cluster, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.slurm import Slurm

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "cluster" / "slurm"
SECRET = "hunter2-of-tests"
RECIPE = """\
run: unused
model: {size: tiny, width: 128, depth: 6, heads: 2, image_size: 32, patch_size: 8, vocabulary: 64, drop_path: 0.2}
masking: {min_block: 4}
precision: fp32
global_batch: 16
micro_batch: 1
steps: 80
optimizer: {lr: 1e-3, warmup_steps: 5}
loader: {workers: 1, lanes: 4}
checkpoint: {every_steps: null, every_minutes: null}
logging: {every_steps: 1, metrics_port: null}
"""
FEWER = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_NUMBERS = ("step", "samples", "loss", "accuracy", "lr", "grad_norm", "masked", "batch")


def settings(folder: Path) -> dict[str, str]:
    """Variables for jobs of a folder with ``shards``: the recipe, and what makes ranks small; and a secret."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    (folder / "targets" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "targets" / "tokenize").mkdir(exist_ok=True)
    return {
        "DATA": str(folder / "shards"),
        "RECIPE": str(recipe),
        "DS_CONFIG": str(ROOT / "configs" / "deepspeed" / "zero1.json"),
        "PYTHON": sys.executable,
        "BEIT_SLURM": str(SCRIPTS),
        "BEIT_TARGETS": str(folder / "targets"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


class Job:
    """A run under ``pretrain.sbatch``, one task on each of two hosts.

    Args:
        slurm: the cluster.
        run: the run folder, beside ``shards``.
        overrides: of the recipe.
        variables: more of them.
    """

    def __init__(self, slurm: Slurm, run: Path, *overrides: str, **variables: str) -> None:
        self._slurm, self.run = slurm, run
        environment = {**settings(run.parent), "RUN": str(run), **variables}
        if slurm.networks is None:
            environment = {"MASTER_ADDR": "127.0.0.1", **environment}
        output = run.parent / f"{run.name}-%j.out"
        command = ["sbatch", "--parsable", *FEWER, f"--output={output}", f"--chdir={run.parent}"]
        self.number = slurm(
            *command, str(SCRIPTS / "pretrain.sbatch"), "seed=3", *overrides, **environment
        ).strip()
        self._output = run.parent / f"{run.name}-{self.number}.out"

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def facts(self) -> dict[str, str]:
        """What SLURM says of it."""
        return self._slurm.job(self.number)

    def until(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        """Wait for something that is seen from outside."""
        deadline, look = time.monotonic() + seconds, 0.0
        while not condition():
            time.sleep(0.05)
            if (now := time.monotonic()) > look:
                look = now + 2
                late = now > deadline or self.facts["JobState"] in ENDED
                if late and not condition():
                    pytest.fail(f"it did not come to that: {self.facts}\n{self.output[-3000:]}")

    def until_step(self, attempt: int, count: int) -> None:
        """Wait until an attempt has recorded so many steps."""
        self.until(lambda: sum(line["attempt"] == attempt for line in lines(self.run)) >= count)

    def stopped(self) -> int:
        """Wait until the run has been stopped with a checkpoint; the step."""
        self.until((self.run / "PREEMPTED").exists)
        found: int = json.loads((self.run / "PREEMPTED").read_text())["step"]
        assert list(self.run.glob(f"checkpoints/step-{found:08d}.*/manifest.json"))
        return found

    def ended(self) -> dict[str, str]:
        """Wait for the job's end; what SLURM says of it."""
        self.until(lambda: self.facts["JobState"] in ENDED)
        return self.facts

    def ranks(self) -> list[psutil.Process]:
        """Its ranks on this machine, without the processes that load their data."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()  # other clusters number their jobs from 1 too
                mine = [variables.get(name) for name in ("SLURM_CONF", "SLURM_JOB_ID")]
                parent = process.parent() if mine == [self._slurm.environment["SLURM_CONF"], self.number] else None
                if parent is not None and "slurmstepd" in parent.name() and "beit_dist.train" in process.cmdline():
                    found.append(process)
        return found


def frozen(ranks: list[psutil.Process]) -> contextlib.ExitStack:
    """Hold ranks where they are until the block ends, so that they do not come to their end meanwhile."""
    stack = contextlib.ExitStack()
    for rank in ranks:
        rank.suspend()
        stack.callback(_resume, rank)
    deadline = time.monotonic() + 60
    while not all(_stopped(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return stack


def _stopped(rank: psutil.Process) -> bool:
    """Whether all its threads are: one that waits for a disk ends its call first."""
    states = [
        path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{rank.pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def _resume(rank: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.resume()


def awaits(rank: psutil.Process, number: signal.Signals) -> bool:
    """Whether a frozen process has got a signal that it will see when it goes on."""
    with open(f"/proc/{rank.pid}/status") as status:
        pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in pending)


def lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of its numbers."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the last bit between two runs, one tuple a step."""
    return [tuple(line[name] for name in _NUMBERS) for line in lines(run)]


def tensors(run: Path) -> list[str]:
    """sha256 of the tensors of the last checkpoint."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return [file["sha256"] for file in files if file["file"].endswith(".safetensors")]


def uninterrupted(folder: Path) -> Path:
    """The same run with two ranks on this machine, without SLURM."""
    run = folder / "whole"
    known = settings(folder)
    command = [sys.executable, "-m", "beit_dist", "train", "--ranks", "2", "--ds_config", known["DS_CONFIG"]]
    command += ["--config", known["RECIPE"], f"run={run}", f"data={known['DATA']}", "seed=3"]
    found = subprocess.run(
        command, env={**os.environ, **known}, cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return run


def assert_untold(folder: Path) -> None:
    """No file that jobs have left in a folder, and no command line of a process, has the secret."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".tar", ".safetensors"):
            assert SECRET.encode() not in path.read_bytes(), path
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert SECRET not in " ".join(process.cmdline())
