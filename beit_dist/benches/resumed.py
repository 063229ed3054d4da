"""A run killed with -9 and resumed, against the same run left alone: how many steps are equal to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from beit_dist.benches.made_shards import write_shards
from beit_dist.benches.measuring import Row, row
from beit_dist.benches.trainer import environment
from beit_dist.errors import TrainingError


def measure(quick: bool) -> Iterator[Row]:
    """``deterministic=true``, on a GPU with compiled blocks; killed some steps behind a checkpoint."""
    gpu = torch.cuda.is_available()
    size, steps, batch = ("base", 30, 64) if gpu and not quick else ("tiny", 10, 2)
    settings = ["deterministic=true", f"compile={str(gpu).lower()}", f"steps={steps}", f"model.size={size}"]
    settings += [f"global_batch={batch}", f"micro_batch={batch}", f"checkpoint.every_steps={steps // 3}"]
    settings += ["optimizer.warmup_epochs=null", "logging.every_steps=1", "logging.metrics_port=null"]
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 4, 2 * batch)
        alone = _train(folder, "alone", settings)
        _train(folder, "killed", settings, kill_at=steps // 3 + 3)
        killed = _train(folder, "killed", settings)
    equal = sum(
        _without_attempt(mine) == _without_attempt(theirs) for mine, theirs in zip(alone, killed, strict=False)
    )
    case = f"{size}, {steps} steps, a checkpoint every {steps // 3}"
    yield row("resumed", case, "equal to the last bit", [equal], f"of {steps} steps")


def _train(folder: str, name: str, settings: list[str], kill_at: int | None = None) -> list[str]:
    """The lines of metrics.jsonl once the run has ended, or was killed when it had so many."""
    metrics = Path(folder, name, "metrics.jsonl")
    command = [sys.executable, "-m", "beit_dist", "train", "--ranks", "1", "--config", "beit_base"]
    command += ["--data", folder, "--run", str(metrics.parent), *settings]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    while kill_at is not None and process.poll() is None:
        if metrics.exists() and len(_lines(metrics)) >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    _, said = process.communicate()
    if process.returncode and kill_at is None:
        raise TrainingError(f"{' '.join(command)}: {(said.strip().splitlines() or ['no message'])[-1]}")
    return _lines(metrics)


def _lines(metrics: Path) -> list[str]:
    return [line for line in metrics.read_text().splitlines() if '"step"' in line]


def _without_attempt(line: str) -> str:
    return line.rpartition(', "attempt"')[0]
