"""Steps through the trainer itself, from shards, on one rank and two: ``beit train --dry-run --measure``.

Beside it the same model, update and precision in plain PyTorch, which is what DeepSpeed and the trainer may cost
on top of.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from beit_dist.benches.contender import Contender, largest_product
from beit_dist.benches.contenders import UnavailableError
from beit_dist.benches.inputs import MASKED
from beit_dist.benches.made_shards import write_shards
from beit_dist.benches.measuring import Row, row
from beit_dist.benches.step import mfu_rows
from beit_dist.config.model import ModelConfig
from beit_dist.engine.precision import choose, speeds
from beit_dist.engine.task import OPERATIONS
from beit_dist.errors import TrainingError
from beit_dist.models.flops import multiply_adds

_MEASURED = re.compile(
    r"measured +([\d.e+-]+) s a step \(([\d.e+-]+) to ([\d.e+-]+) .*data wait ([\d.]+)%", re.MULTILINE
)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        size: of the model.
        batch: images of a rank's step.
        more: settings besides.
    """

    size: str
    batch: int
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join((self.size, f"batch {self.batch}", *self.more))


_QUICK = (Case("tiny", 4),)
_CPU = (Case("base", 8), Case("small", 8))
_GPU = (
    Case("base", 256, ("compile=true",)),
    Case("base", 256, ("compile=true", "attention=kernel")),
    Case("large", 128, ("compile=true", "attention=kernel")),
    Case("large", 128, ("compile=true",)),
    Case("large", 128, ("compile=true", "attention=kernel", "fp8=true")),
)


def measure(quick: bool) -> Iterator[Row]:
    """The shipped recipes, at ZeRO stage 1, in the precision that suits the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in _QUICK if quick else _GPU if device.type == "cuda" else _CPU:
        yield from rows_of(case, device)


def rows_of(case: Case, device: torch.device) -> Iterator[Row]:
    """One rank, plain PyTorch beside it, and on a CPU with two cores two ranks."""
    precision = choose("auto", "", None, [("", speeds(device))]).precision
    named = f"{case}, {precision}"
    with tempfile.TemporaryDirectory() as folder:
        batches = 4 if device.type == "cpu" else 16
        write_shards(Path(folder), 4, case.batch * batches // 4)
        alone, waited = through_trainer(folder, case, precision, 1)
        yield row("trainer", named, "train.py, 1 rank", [case.batch / each for each in alone], "images/s")
        work = case.batch * OPERATIONS * multiply_adds(ModelConfig(size=case.size), MASKED) / 1e12
        yield row("trainer", named, "train.py, 1 rank", [work / each for each in alone], "TFLOP/s")
        yield from mfu_rows("trainer", named, "train.py, 1 rank", [work / each for each in alone], precision)
        yield row("trainer", named, "data wait", [100 * waited], "% of a step")
        if set(case.more) <= {"compile=true"}:  # plain PyTorch has no other ways
            yield from _beside_plain(named, case, precision, alone, work, device)
        if device.type == "cpu" and len(os.sched_getaffinity(0)) > 1:
            both, _ = through_trainer(folder, case, precision, 2)
            ratios = [statistics.median(alone) / each for each in both]
            yield row("trainer", named, "2 ranks / 2 × 1 rank", ratios, "×")
            yield from _two_at_once(named, case, precision)


def through_trainer(data: str, case: Case, precision: str, ranks: int) -> tuple[list[float], float]:
    """Seconds of a step, the median first, then the least and the most; and the share of data wait.

    Raises:
        TrainingError: the trainer failed; the text is its last line.
    """
    batch = case.batch * ranks
    settings = [f"model.size={case.size}", f"global_batch={batch}", f"micro_batch={case.batch}", "steps=100000"]
    settings += [f"precision={precision}", f"masking.masked_patches={MASKED}", "model.drop_path=0.1", *case.more]
    recipe = {"large": "beit_large", "base": "beit_base"}.get(case.size, f"beit_{case.size}")
    command = [sys.executable, "-m", "beit_dist", "train", "--dry-run", "--measure", "--ranks", str(ranks)]
    command += ["--config", recipe, "--data", data, "--run", str(Path(data, "run")), *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if (found := _MEASURED.search(done.stdout)) is None:
        raise TrainingError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [float(found[number]) for number in (1, 2, 3)], float(found[4]) / 100


def environment() -> dict[str, str]:
    """Of a process that imports what this one does; one thread on a CPU, unless the user says otherwise."""
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _two_at_once(named: str, case: Case, precision: str) -> Iterator[Row]:
    """What the machine leaves of a step when its other core takes steps too: two ranks cannot do better."""
    name = "ours, compiled, updated" if "compile=true" in case.more else "ours, updated"
    given = (name, case.size, case.batch, precision, None, "wall", environment())
    try:
        with Contender(*given) as one, Contender(*given) as other:
            alone, beside = one.step(3), one.step_beside(other, 3)
    except UnavailableError as reason:
        print(f"trainer: two processes: left out: {reason}", file=sys.stderr)
        return
    ratios = [statistics.median(alone) / each for each in beside]
    yield row("trainer", named, "2 processes that exchange nothing / 2 × 1", ratios, "×")


def _beside_plain(
    named: str, case: Case, precision: str, alone: list[float], work: float, device: torch.device
) -> Iterator[Row]:
    name = "ours, compiled, updated" if "compile=true" in case.more else "ours, updated"
    try:
        with Contender(name, case.size, case.batch, precision, None, "wall", environment()) as plain:
            bare, products = plain.step(3 if device.type == "cpu" else 20), plain.product(5)
    except UnavailableError as reason:
        print(f"trainer: plain PyTorch: left out: {reason}", file=sys.stderr)
        return
    middle = statistics.median(bare)
    yield row("trainer", named, "plain PyTorch", [case.batch / each for each in bare], "images/s")
    yield row("trainer", named, "train.py / plain PyTorch", [middle / each for each in alone], "×")
    ceiling = 2e-12 * largest_product(device) ** 3 / statistics.median(products)
    yield row("trainer", named, "train.py", [work / each / ceiling for each in alone], "of the ceiling")
