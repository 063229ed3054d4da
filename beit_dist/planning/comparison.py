"""A plan held against what a run recorded: predicted, measured, and their ratio."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from beit_dist.checkpoints.layout import MANIFEST
from beit_dist.config.recipes import named
from beit_dist.engine.memory import in_words, size_of_checkpoint
from beit_dist.engine.resolve import read_ds_config, resolve
from beit_dist.engine.run_folder import METRICS, VALIDATION
from beit_dist.errors import ConfigError
from beit_dist.planning.devices import device_named
from beit_dist.planning.memory import AnyTask
from beit_dist.planning.plan import Choice, Question, choose
from beit_dist.planning.storage import checkpoint


@dataclass(frozen=True)
class Recorded:
    """What a run folder says."""

    folder: str
    kind: str
    config: Mapping[str, Any]
    ranks: int
    per_node: int
    """Most ranks of a host."""
    stage: int
    precision: str
    step: float
    """Seconds, the median."""
    steps: int
    """That it is the median of; the first interval, which warms up, is left out where there are others."""
    wait: float | None
    """Median share of the time that rank 0 waited for data; None where the run did not record it."""
    memory: int | None
    """Peak of rank 0, in bytes; likewise."""
    saved: int | None
    """Bytes of the newest checkpoint; None where there is none."""
    stall: float | None
    """Seconds that a save held training up, the median; None where none can be told."""


def recorded_run(folder: str) -> Recorded:
    """Read a run folder.

    Raises:
        ConfigError: there is no run, or it has recorded no steps.
    """
    path = Path(folder)
    try:
        config: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        facts: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        lines = _lines(path / METRICS)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("--measured", folder, f"a run folder ({error})") from None
    lines = [line for line in lines if line.get("attempt") == facts.get("attempt") and "images_per_second" in line]
    if not lines:
        raise ConfigError("--measured", folder, f"a run whose last start has recorded steps in {METRICS}")
    intervals = [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["time"])]
    warm = [line for interval in intervals[1:] or intervals for line in interval]
    batch = int(config["global_batch"])
    waits = [line["data_wait"] for line in warm if "data_wait" in line]
    return Recorded(
        folder,
        facts.get("kind", "pretraining"),
        config,
        facts["world_size"],
        max(Counter(rank["host"] for rank in facts["ranks"]).values()),
        facts["stage"],
        facts["precision"],
        statistics.median(batch / line["images_per_second"] for line in warm),
        len(warm),
        statistics.median(waits) if waits else None,
        max((line["peak_memory"] for line in lines if "peak_memory" in line), default=None),
        _checkpoint_bytes(path),
        _stall(intervals, batch, config, _lines(path / VALIDATION)),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _checkpoint_bytes(run: Path) -> int | None:
    manifests = sorted(run.glob(f"checkpoints/step-*/{MANIFEST}"))
    if not manifests:
        return None
    files = json.loads(manifests[-1].read_text(encoding="utf-8"))["files"]
    return sum(int(file["bytes"]) for file in files if file["file"].endswith(".safetensors"))


def _stall(
    intervals: list[list[dict[str, Any]]],
    batch: int,
    config: Mapping[str, Any],
    measurements: list[dict[str, Any]],
) -> float | None:
    """What lies between two fetches besides the steps, where a save and no measurement lies there."""
    every = config["checkpoint"]["every_steps"]
    if every is None:
        return None
    measured = {line["step"] for line in measurements}
    found = []
    for before, interval in itertools.pairwise(intervals):
        begun = range(before[-1]["step"], interval[-1]["step"])  # a save follows the step
        if any(step % every == 0 for step in begun) and not measured & set(begun):
            training = len(interval) * batch / interval[-1]["images_per_second"]
            found.append(max(0.0, interval[-1]["time"] - before[-1]["time"] - training))
    return statistics.median(found) if found else None


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    unit: str
    """``s``, ``images/s``, ``bytes`` or ``share``."""
    predicted: float
    measured: float | None
    """None: the run did not record it."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return None if self.measured is None or not self.predicted else self.measured / self.predicted


@dataclass(frozen=True)
class Comparison:
    """A run beside its plan."""

    run: Recorded
    device: str
    choice: Choice
    rows: tuple[Row, ...]

    def facts(self) -> dict[str, Any]:
        """Plain data."""
        run = {key: value for key, value in asdict(self.run).items() if key != "config"}
        rows = [asdict(row) | {"ratio": row.ratio} for row in self.rows]
        return {"run": run, "device": self.device, "mfu": asdict(self.choice.mfu), "rows": rows}


def compare(run: Recorded, task: AnyTask, gpu: str, mfu: float | None) -> Comparison:
    """The plan for a run's own settings, and what it recorded.

    Args:
        run: what it recorded.
        task: of its recipe.
        gpu: that it ran on.
        mfu: in place of the plan's.

    Raises:
        ConfigError: no such device, or this version refuses the run's settings.
    """
    device = device_named(gpu, run.per_node)
    resolved = resolve(task.config, read_ds_config(named("deepspeed", f"zero{run.stage}")), run.ranks)
    resolved = resolved.settled(run.precision, "from the run")
    question = Question(gpus=run.ranks, per_node=run.per_node, device=device, mfu=mfu)
    recompute = bool(getattr(task.config, "activation_checkpointing", False))
    choice = choose(task, resolved, question, recompute=recompute)
    size = size_of_checkpoint(task)
    save = checkpoint(task.config, size, run.ranks, device, None, choice.step)
    batch = task.config.global_batch
    rows = (
        Row("step", "s", choice.step, run.step),
        Row("speed", "images/s", batch / choice.step, batch / run.step),
        Row("data wait", "share", max(0.0, 1 - (choice.compute + choice.exposed) / choice.step), run.wait),
        Row("memory", "bytes", choice.memory.total, run.memory),
        Row("checkpoint", "bytes", size, run.saved),
        Row("stall", "s", save.stall, run.stall),
    )
    return Comparison(run, gpu, choice, rows)


def comparison_lines(found: Comparison) -> Iterator[str]:
    """A run beside its plan, in 80 columns."""
    run, resolved = found.run, found.choice.resolved
    yield run.folder
    yield (
        f"  {run.kind}, {run.ranks} × {found.device}, ZeRO stage {run.stage}, {run.precision}, "
        f"{resolved.accumulation} × {resolved.micro_batch} a rank; {run.steps} steps"
    )
    yield f"  MFU {found.choice.mfu.value:.3f}, {found.choice.mfu.source}"
    yield f"  {'':<12}{'predicted':>14}{'measured':>14}{'measured / predicted':>24}"
    for row in found.rows:
        measured = "not recorded" if row.measured is None else _shown(row.unit, row.measured)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        yield f"  {row.name:<12}{_shown(row.unit, row.predicted):>14}{measured:>14}{ratio:>24}"


def _shown(unit: str, value: float) -> str:
    if unit == "bytes":
        return in_words(value)
    return f"{value:.1%}" if unit == "share" else f"{value:.3g} {unit}"
