"""The batch scripts on a real SLURM of two nodes: a run that is stopped and put back, and images to weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.slurm import Slurm

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import load_manifest
from beit_dist.weights.tokenizer_files import save_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "cluster" / "slurm"
SCRIPT = SCRIPTS / "pretrain.sbatch"
RECIPE = """\
run: unused
model: {size: tiny, width: 128, depth: 6, heads: 2, image_size: 32, patch_size: 8, vocabulary: 64, drop_path: 0.2}
masking: {min_block: 4}
global_batch: 16
micro_batch: 1
steps: 80
optimizer: {lr: 1e-3, warmup_steps: 5}
loader: {workers: 1, lanes: 4}
checkpoint: {every_steps: null, every_minutes: null}
logging: {every_steps: 1, metrics_port: null}
"""
NUMBERS = ("step", "samples", "loss", "accuracy", "lr", "grad_norm", "masked", "batch")


class Job:
    """A run under the batch script, one task on each node."""

    def __init__(self, slurm: Slurm, run: Path, data: Path) -> None:
        self._slurm, self.run = slurm, run
        recipe = run.parent / "recipe.yaml"
        recipe.write_text(RECIPE)
        self._output = run.parent / f"{run.name}.out"
        (run.parent / "configs").mkdir(exist_ok=True)
        fewer = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=30"
        settings = {"RUN": run, "DATA": data, "RECIPE": recipe, "PYTHON": sys.executable}
        settings["DS_CONFIG"] = ROOT / "configs" / "deepspeed" / "zero1.json"
        environment = {name: str(value) for name, value in settings.items()}
        environment |= {
            "BEIT_SLURM": str(SCRIPTS),
            "MASTER_ADDR": "127.0.0.1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        command = ["sbatch", "--parsable", *fewer.split(), f"--output={self._output}", f"--chdir={run.parent}"]
        self.number = slurm(*command, str(SCRIPT), "seed=3", **environment).strip()

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def until(self, condition: Callable[[], Any], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"it did not come to that: {self._slurm.job(self.number)}\n{self.output[-3000:]}")
            time.sleep(0.05)

    def until_step(self, attempt: int, count: int) -> None:
        """Wait until an attempt has recorded so many steps."""
        self.until(lambda: sum(line["attempt"] == attempt for line in self.lines()) >= count)

    def stopped(self) -> int:
        """Wait until the run has been stopped; the step."""
        self.until((self.run / "PREEMPTED").exists)
        found: int = json.loads((self.run / "PREEMPTED").read_text())["step"]
        assert list(self.run.glob(f"checkpoints/step-{found:08d}.*/manifest.json"))
        return found

    def ended(self) -> dict[str, str]:
        """Wait for the job's end; what SLURM says of it."""
        self.until(lambda: self._slurm.job(self.number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"))
        return self._slurm.job(self.number)


def test_a_job_that_is_stopped_and_put_back_ends_as_if_nothing_had_happened(
    slurm: Slurm, tmp_path: Path, make_shards: Callable[..., Any]
) -> None:
    make_shards(tmp_path / "shards", [50, 64, 33], views=2)
    whole = Job(slurm, tmp_path / "whole", tmp_path / "shards")
    job = whole.ended()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), whole.output
    assert (whole.run / "DONE").exists()

    broken = Job(slurm, tmp_path / "broken", tmp_path / "shards")
    broken.until_step(attempt=1, count=5)
    # To the script and to all processes of the tasks at once. The script passes it on, so that the tasks get it
    # twice; then it puts the job back.
    slurm("scancel", "--signal=USR1", "--full", broken.number)
    first = broken.stopped()
    broken.until_step(attempt=2, count=5)
    assert slurm.job(broken.number)["Restarts"] == "1"
    # An operator's requeue is like a preemption: SIGTERM to script and tasks, and SIGKILL when the time is over.
    slurm("scontrol", "requeue", broken.number)
    second = broken.stopped()
    job = broken.ended()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2"), broken.output
    assert 5 <= first < first + 5 <= second < 80

    said = broken.output
    assert said.count("stopped on request") == 2
    assert f"resumed from step-{first:08d}.a0001" in said
    assert f"resumed from step-{second:08d}.a0002" in said
    assert "Traceback" not in said
    facts = json.loads((broken.run / "run.json").read_text())
    assert facts["attempt"] == 3
    assert [rank["rank"] for rank in facts["ranks"]] == [0, 1]
    assert (broken.run / "DONE").exists()
    assert not any((broken.run / marker).exists() for marker in ("PREEMPTED", "FAILED"))
    numbers = [[tuple(line[name] for name in NUMBERS) for line in one.lines()] for one in (broken, whole)]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 80
    assert _tensors(broken.run) == _tensors(whole.run)
    assert not [pid for pid in (rank["pid"] for rank in facts["ranks"]) if os.path.exists(f"/proc/{pid}")]


def _tensors(run: Path) -> list[str]:
    """sha256 of the tensors of the last checkpoint."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return [file["sha256"] for file in files if file["file"].endswith(".safetensors")]


def test_a_pipeline_turns_images_into_weights(slurm: Slurm, tmp_path: Path) -> None:
    for image in range(24):
        path = tmp_path / "images" / f"{image}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(image).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    config = DVAEConfig(vocabulary=64, hidden=4, blocks_per_group=1, decoder_input=4)
    save_tokenizer(tmp_path / "tokenizer.safetensors", DVAE(config, 0), config, {})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    targets = tmp_path / "targets" / "tokenize"
    targets.mkdir(parents=True)

    environment = {
        **slurm.environment,
        "PYTHON": sys.executable,
        "RUN": "run",
        "RECIPE": "recipe.yaml",
        "DS_CONFIG": str(ROOT / "configs" / "deepspeed" / "zero1.json"),
        "BEIT_WORKERS": "2",
        "BEIT_TARGETS": str(targets.parent),
        "STEP_SBATCH": "--cpus-per-task=1 --time=30",
        "TOKENIZE_SBATCH": "--cpus-per-task=1 --gpus-per-node=0 --time=30",
        "PRETRAIN_SBATCH": "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=30",
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "AWS_SECRET_ACCESS_KEY": "hunter2-of-tests",
    }
    shards = ["--image-size", "32", "--patch-size", "8", "--shard-samples", "4", "--decoders", "0"]
    command = ["bash", str(SCRIPTS / "pipeline.sh"), "steps=8", "--", *shards]

    def pipeline() -> list[str]:
        submitting = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert submitting.returncode == 0, submitting.stderr
        return submitting.stdout.splitlines()

    *_, export = pipeline()
    number = export.rpartition(" ")[2]
    deadline = time.monotonic() + 400
    while slurm.job(number)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, said(tmp_path)
        time.sleep(0.2)
    assert slurm.job(number)["JobState"] == "COMPLETED", said(tmp_path)

    workers = [path.read_text() for path in sorted(tmp_path.glob("beit-tokenize-*_[01].out"))]
    assert ["3 shards made" in text for text in workers] == [True, True], workers
    manifest = load_manifest(str(tmp_path / "shards"))
    assert (manifest.samples, len(manifest.shards)) == (24, 6)
    check = [sys.executable, "-m", "beit_dist", "check", str(tmp_path / "shards")]
    assert subprocess.run(check, env=environment, capture_output=True, timeout=120).returncode == 0
    assert (tmp_path / "run" / "DONE").exists()
    assert (tmp_path / "run" / "exported" / "model.safetensors").stat().st_size > 0
    assert not list(targets.parent.rglob("*.json*"))
    assert "hunter2-of-tests" not in said(tmp_path)
    assert [line.endswith("is there") for line in pipeline()] == [True] * 3


def said(folder: Path) -> str:
    """What all jobs have printed."""
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.out")))
