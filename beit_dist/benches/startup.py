"""From the command to the first step, of a new run and of a resumed one, beside the imports that come first."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from beit_dist.benches.made_shards import write_shards
from beit_dist.benches.measuring import Row, row
from beit_dist.benches.trainer import environment
from beit_dist.errors import TrainingError

_SETTINGS = ("micro_batch=1", "global_batch=1", "precision=fp32", "optimizer.warmup_epochs=null")
_LOGGED = ("logging.every_steps=1", "logging.metrics_port=null", "preflight=true")


def measure(quick: bool) -> Iterator[Row]:
    """One rank, a step of one image, so that the step itself is short; shards in the page cache."""
    size, repetitions = ("tiny", 1) if quick else ("base", 3)
    imports: list[float] = []
    new: list[float] = []
    steps: list[float] = []
    resumed: list[float] = []
    for _ in range(repetitions):
        imports.append(_seconds_of([sys.executable, "-c", "import torch, deepspeed, numpy"]))
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), 1, 16)
            new.append(_until_a_step(folder, size, 1))
            steps.append(_first_step(folder))
            resumed.append(_until_a_step(folder, size, 2))
    case = f"{size}, 1 rank"
    ours = [n - i - s for n, i, s in zip(new, imports, steps, strict=True)]
    yield row("startup", case, "import torch and DeepSpeed", imports, "s")
    yield row("startup", case, "command to first step", new, "s")
    yield row("startup", case, "that step itself", steps, "s")
    yield row("startup", case, "the rest: our imports and set-up", ours, "s")
    yield row("startup", case, "command to first step, resumed", resumed, "s")
    yield row("startup", case, "a resume adds", [r - n for r, n in zip(resumed, new, strict=True)], "s")


def _seconds_of(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return time.perf_counter() - began


def _first_step(folder: str) -> float:
    """Seconds of a run's first step, of one image."""
    first = json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[0])
    return 1 / float(first["images_per_second"])


def _until_a_step(folder: str, size: str, step: int) -> float:
    """Seconds until the numbers of a run's step are on the disk. The run ends with that step."""
    run = Path(folder, "run")
    metrics = run / "metrics.jsonl"
    command = [sys.executable, "-m", "beit_dist", "train", "--ranks", "1", "--config", f"beit_{size}"]
    command += ["--data", folder, "--run", str(run), f"model.size={size}", f"steps={step}", *_SETTINGS, *_LOGGED]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        while not (metrics.exists() and metrics.read_text().count("\n") >= step):
            if process.poll() is not None:
                assert process.stderr is not None  # for the type checker: it was asked for
                raise TrainingError(
                    f"{' '.join(command)}: {(process.stderr.read().strip().splitlines() or ['no message'])[-1]}"
                )
            time.sleep(0.01)
        taken = time.perf_counter() - began
        process.communicate()
    return taken
