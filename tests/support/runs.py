"""Starting real training runs, small enough for a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked import Forked
from support.ports import free_ports

from beit_dist.engine.ranks.distributed import Ranks, init_process_groups

ROOT = Path(__file__).parents[2]
RECIPE = """\
model: {size: tiny, width: 32, depth: 2, heads: 2, image_size: 32, patch_size: 8, vocabulary: 64, drop_path: 0.2}
masking: {min_block: 4}
global_batch: 16
micro_batch: 4
epochs: 5
optimizer: {lr: 1e-2, warmup_steps: 5}
loader: {workers: 1, lanes: 4, timeout_seconds: 120}
checkpoint: {every_steps: 7, every_minutes: null, keep: 2}
logging: {every_steps: 1, metrics_port: null}
"""


@dataclass
class Run:
    """A run folder and the settings that its starts have in common."""

    folder: Path
    data: Path
    recipe: Path
    ds_config: Path
    ranks: int = 1
    overrides: list[str] = field(default_factory=list)
    entry: Path = ROOT / "beit_dist" / "train.py"
    deepspeed: bool = False
    """The real launcher starts the ranks, which takes longer."""
    forked: bool = True
    """Else, ranks are forked; or one is started as a user does, which takes longer too."""

    def words(self, *overrides: str) -> list[str]:
        """The program and its arguments."""
        train = [str(self.entry), "--ds_config", str(self.ds_config)]
        train += ["--config", str(self.recipe), f"run={self.folder}", f"data={self.data}"]
        return [*train, *self.overrides, *overrides]

    def command(self, *overrides: str) -> list[str]:
        """The command line of a start that is not forked: plain Python for one rank."""
        launcher = [sys.executable]
        if self.deepspeed:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(self.ranks)]
            launcher += ["--master_port", str(free_ports(1)[0])]
        return [*launcher, *self.words(*overrides)]

    def start(self, *overrides: str, **options: Any) -> Any:
        """Start training and return at once: a ``Popen``, or what can be used as one; ``options`` are its."""
        if self.forked and not self.deepspeed:
            place = {"ranks": self.ranks, "port": free_ports(1)[0]}
            return Forked(self.words(*overrides), os.environ, self.folder.parent, **place, **options)
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command(*overrides),
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.folder.parent,
            **{"stdout": subprocess.PIPE, **options},
        )

    def finish(self, *overrides: str, seconds: float = 180) -> tuple[int, str]:
        """Start training and wait; exit code and output."""
        return wait(self.start(*overrides), seconds)

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def numbers(self) -> list[tuple[Any, ...]]:
        """What must be equal to the last bit between two runs, one tuple a step."""
        names = ("step", "samples", "loss", "accuracy", "lr", "grad_norm", "masked", "bad", "skipped", "batch")
        return [tuple(line[name] for name in names) for line in self.lines()]

    def signal_at(self, step: int, number: signal.Signals, rank: int | None = 0) -> tuple[int, str]:
        """Start training, send a rank (None: all) a signal once ``step`` is recorded, and wait for the end."""
        process = self.start()
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step for line in self.lines()):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no step {step}: {wait(process)}")
            time.sleep(0.01)
        for place in self.facts()["ranks"]:
            if rank in (None, place["rank"]):
                os.kill(place["pid"], number)
        return wait(process)

    def facts(self) -> dict[str, Any]:
        """run.json."""
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return found

    def final_files(self) -> dict[str, str]:
        """sha256 of the newest checkpoint's tensors, by file."""
        newest = self.folder / "checkpoints" / (self.folder / "checkpoints" / "latest").read_text().strip()
        manifest = json.loads((newest / "manifest.json").read_text())
        return {f["file"]: f["sha256"] for f in manifest["files"] if f["file"].endswith(".safetensors")}


def wait(process: Any, seconds: float = 180) -> tuple[int, str]:
    """Exit code and output of a process; it is killed when it does not end."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"training did not end in {seconds} s: {output[-3000:]}")
    return process.returncode, output


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory, make_shards: Callable[..., Any]) -> Path:
    """147 samples of 32 px in three shards and two views."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, [50, 64, 33], views=2)
    return folder


@pytest.fixture
def new_run(tmp_path: Path, small_data: Path) -> Callable[..., Run]:
    """``new_run(name, ds="zero1.json" or a dict, ranks=1, overrides=[], deepspeed=False, forked=True)``."""

    def make(
        name: str,
        ds: str | dict[str, Any] = "zero1.json",
        ranks: int = 1,
        overrides: Any = (),
        deepspeed: bool = False,
        forked: bool = True,
    ) -> Run:
        named = isinstance(ds, dict) and bool({"bf16", "fp16"} & set(ds))
        recipe = tmp_path / ("recipe.yaml" if named else "recipe-fp32.yaml")
        # fp32 is fast on every machine, and `auto` might be another one in the next start beside other work.
        precision = "auto" if named else "fp32"
        recipe.write_text(f"run: {tmp_path / name}\nprecision: {precision}\n{RECIPE}")
        ds_config = ROOT / "configs" / "deepspeed" / ds if isinstance(ds, str) else tmp_path / f"{name}.json"
        if isinstance(ds, dict):
            ds_config.write_text(json.dumps(ds))
        launcher = {"deepspeed": deepspeed, "forked": forked}
        return Run(tmp_path / name, small_data, recipe, ds_config, ranks, list(overrides), **launcher)

    return make


@pytest.fixture(scope="session")
def _joined() -> torch.device:
    """The process groups of a rank that is alone; once and for good, as DeepSpeed keeps hold of them."""
    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["DS_ACCELERATOR"] = "cpu"
    device = init_process_groups(Ranks(), timedelta(minutes=5))
    os.environ.clear()  # what it has set is not for the processes that tests start
    os.environ.update(before)
    return device


@pytest.fixture
def joined(_joined: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """This process as the only rank, and its device; DeepSpeed wants the ranks' variables."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    return _joined
