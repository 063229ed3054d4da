"""What the steps of a run leave behind: their numbers stay on the device until the logging interval.

Then they are fetched together, summed over the ranks, and go to all who ask: ``metrics.jsonl``, the metrics, the
sinks, the progress line. Which numbers there are, and how each is shown, the task declares.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.config.run import LoggingConfig
from beit_dist.engine.device import peak_memory
from beit_dist.engine.lines import Lines
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.progress import Pace, ProgressLine
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks
from beit_dist.engine.task import Step, Task
from beit_dist.step_numbers import Baselines, KnownBaselines

_NO_BASELINES = KnownBaselines()


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What the host knows of a step that was taken, without asking the device."""

    number: int
    """Of the step."""
    step: Step
    samples: int
    """Samples trained on up to and including this step."""
    epoch: float
    """Passes over the data, with fraction."""
    lr: float
    applied: bool
    """False: the gradients were not finite and nothing was updated."""
    wait_seconds: float
    """How long this rank waited for the step's data."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a run's numbers are counted by."""

    attempt: int
    """Number of this start of the run."""
    total_steps: int
    """Steps at which the run is done."""
    batch: int
    """Samples of a step, over all ranks."""
    flops_per_sample: int
    """FLOPs of forward and backward."""


class Recorder:
    """Collects steps on every rank; rank 0 writes ``metrics.jsonl``, the metrics and the progress line.

    Args:
        task: whose numbers they are.
        run: the run folder.
        metrics: rank 0's metrics; None on the other ranks.
        settings: when to fetch, and whether to show a progress line.
        scope: of the run.
        sinks: what else takes the numbers, on rank 0.
        baselines: of the numbers.

    Attributes:
        baselines: shown beside the numbers.
        listeners: told of every line that is written, on rank 0.
    """

    def __init__(
        self,
        task: Task[Any, Any, Any],
        run: RunFolder,
        metrics: Metrics | None,
        settings: LoggingConfig,
        scope: Scope,
        sinks: Sinks | None = None,
        baselines: KnownBaselines = _NO_BASELINES,
    ) -> None:
        self._task, self._metrics, self._settings, self._scope = task, metrics, settings, scope
        self._sinks = sinks or Sinks()
        self.baselines = baselines
        self._progress = ProgressLine(
            (*task.numbers, *task.known),
            self.baselines.training,
            scope.total_steps,
            enabled=settings.progress and metrics is not None,
        )
        self._steps: list[Taken] = []
        self._none_fetched = True
        self._numbers: list[tuple[Tensor, Tensor | None]] = []
        self._folder = run.path
        self._lines = Lines(run.metrics) if metrics is not None else None
        self._results = Lines(run.validation) if metrics is not None and task.evaluates else None
        self._since = time.perf_counter()
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def add(self, taken: Taken, sums: Tensor, tally: Tensor | None, grad_norm: Tensor | float | None) -> bool:
        """Note a step.

        Args:
            sums: float32, this rank's sums of the task's numbers; left on the device.
            tally: int64 counts of this rank, if the task keeps any.
            grad_norm: over all ranks, as DeepSpeed tells it.

        Returns:
            Whether it, and those noted before, were fetched now. The first step of a start is fetched at once, to
            show that the run has begun.
        """
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, dtype=torch.float32).to(sums.device)
        self._steps.append(taken)
        self._numbers.append((torch.cat([sums.float(), norm[None]]), tally))
        if len(self._steps) < self._settings.every_steps and not self._none_fetched:
            return False
        self._none_fetched = False
        self.flush()
        return True

    def flush(self, durable: bool = False) -> None:
        """Fetch the noted steps (collective: small sums over the ranks) and write them out.

        Args:
            durable: also make the lines survive a power loss, as a checkpoint that follows them does.
        """
        if self._steps:
            self._fetch()
        for lines in (self._lines, self._results):
            if lines is not None and durable:
                lines.flush(durable=True)

    @property
    def fault(self) -> str:
        """Rank 0: why lines that a checkpoint relies on are not on the disk; empty when all are."""
        faults = (lines.fault for lines in (self._lines, self._results) if lines is not None)
        return next((fault for fault in faults if fault), "")

    def pause(self) -> None:
        """What happened since the last flush, a save for instance, does not count as training time."""
        if not self._steps:
            self._since = time.perf_counter()

    def has_result(self, step: int) -> bool:
        """Rank 0: whether what was measured at ``step`` is on the disk."""
        if self._results is None or not self._results.path.exists():
            return False
        with self._results.path.open("rb") as lines:
            return any(json.loads(line)["step"] == step for line in lines)

    def add_result(self, step: int, samples: int, values: Mapping[str, Any], seconds: float) -> None:
        """Write at once what was measured on held-out data.

        Args:
            values: of the task's :attr:`~beit_dist.engine.task.Task.measured` numbers, and others for the line.
            seconds: how long it took.
        """
        if self._metrics is None or self._results is None:
            return
        written = {name: finite(value) if isinstance(value, float) else value for name, value in values.items()}
        line = {"step": step, "samples": samples, **written, "seconds": round(seconds, 3)}
        if not self.has_result(step):
            self._results.add(json.dumps(line | {"attempt": self._scope.attempt}))
            self._results.flush()
        numbers = [number for number in self._task.measured if number.name in values]
        self._metrics.set({number.held_out: values[number.name] for number in numbers if number.held_out})
        self._metrics.set({"beit_validation_step": step})
        self._metrics.observe("beit_validation_duration_seconds", seconds)
        curves = {number.name: values[number.name] for number in numbers}
        self._sinks.write(step, {f"validation/{name}": value for name, value in curves.items()})
        self._sinks.write(step, constants("validation", self.baselines.held_out))
        self._progress.measured(step, numbers, written, self.baselines.held_out)

    def end_progress(self) -> None:
        """What is printed from now on comes below the progress line."""
        self._progress.close()

    def close(self) -> None:
        """Write what is noted."""
        self._sinks.close()
        for lines in (self._lines, self._results):
            if lines is not None:
                lines.close()

    # ------------------------------------------------------------------------------------------------- fetching

    def _fetch(self) -> None:
        steps, numbers = self._steps, self._numbers
        self._steps, self._numbers = [], []
        local = torch.stack([own for own, _ in numbers])  # (steps, numbers and norm)
        sums, norms = local[:, :-1].contiguous(), local[:, -1]
        _sum_over_ranks(sums)
        tallies = [tally for _, tally in numbers if tally is not None]
        counts = torch.stack(tallies) if tallies else None
        if counts is not None:
            _sum_over_ranks(counts)
        if self._metrics is None or self._lines is None:
            return  # without waiting for the device
        fetched = (sums.cpu().numpy(), norms.cpu().numpy(), None if counts is None else counts.cpu().numpy())
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        speed = len(steps) * self._scope.batch / seconds
        pace = Pace(speed, min(1.0, sum(taken.wait_seconds for taken in steps) / seconds))
        of_the_interval = {
            "time": round(time.time(), 3),
            "images_per_second": round(speed, 3),
            "data_wait": round(pace.data_wait, 5),
            "peak_memory": peak_memory(local.device),
        }
        lines: list[dict[str, Any]] = []
        for place, taken in enumerate(steps):
            own, norm, tally = (None if each is None else each[place] for each in fetched)
            line = self._line(taken, own, norm, tally) | of_the_interval
            lines.append(line)
            self._lines.add(json.dumps(line))
            # nothing but numbers: a text, such as the batch's digest, is no curve
            self._sinks.write(taken.number, {f"train/{k}": line[k] for k in self._names(line)})
            for listener in self.listeners:
                listener(line)
        self._lines.flush()
        self._export(self._metrics, steps, lines[-1], pace)
        self._progress.steps(lines, pace)

    def _line(self, taken: Taken, sums: Any, norm: Any, tally: Any) -> dict[str, Any]:
        weight = np.float32(max(1, taken.step.weight))
        known = {**taken.step.known, **(self._task.tallied(taken.number, tally) if tally is not None else {})}
        # float() of a float32 is exact and json writes the shortest text that reads back as it: nothing is lost.
        numbers = zip(self._task.numbers, sums, strict=True)
        return {
            "step": taken.number,
            "samples": taken.samples,
            "epoch": round(taken.epoch, 6),
            **{number.name: finite(float(value / weight)) for number, value in numbers},
            "grad_norm": finite(float(norm)),
            **known,
            "lr": taken.lr,
            "skipped": not taken.applied,
            "attempt": self._scope.attempt,
        }

    def _names(self, line: Mapping[str, Any]) -> list[str]:
        """Of the line's numbers that are curves."""
        own = [number.name for number in (*self._task.numbers, *self._task.known) if number.kind == "gauge"]
        return [*own, "lr", "grad_norm", "epoch"]

    def _export(self, metrics: Metrics, steps: list[Taken], line: dict[str, Any], pace: Pace) -> None:
        speed = pace.images_per_second
        metrics.add("beit_train_steps", len(steps))
        metrics.add("beit_train_steps_skipped", sum(not taken.applied for taken in steps))
        metrics.add("beit_train_samples", len(steps) * self._scope.batch)
        for number in (*self._task.numbers, *self._task.known):
            if number.metric is not None and number.kind == "counter":
                metrics.add(number.metric, sum(taken.step.known[number.name] for taken in steps))
            elif number.metric is not None:
                metrics.set({number.metric: _number(line[number.name])})
        self._task.export(metrics)
        metrics.set(
            {
                "beit_train_epoch": line["epoch"],
                "beit_train_grad_norm": _number(line["grad_norm"]),
                "beit_train_learning_rate": line["lr"],
                "beit_train_samples_per_second": speed,
                "beit_train_model_flops_per_second": speed * self._scope.flops_per_sample,
                "beit_data_wait_ratio": pace.data_wait,
            }
        )
        with contextlib.suppress(OSError):
            metrics.set({"beit_run_disk_free_bytes": shutil.disk_usage(self._folder).free})
        self._sinks.write(line["step"], {"speed/samples_per_second": speed, "speed/data_wait": pace.data_wait})
        self._sinks.write(line["step"], constants("train", self.baselines.training))


def constants(group: str, baselines: Baselines) -> dict[str, float | None]:
    """Baselines as curves beside those of their numbers."""
    return {
        f"{group}/{name} ({baseline.name})": baseline.value
        for name, known in baselines.items()
        for baseline in known
    }


def finite(value: float) -> float | None:
    """For JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    """The reverse of :func:`finite`."""
    return math.nan if value is None else value


def _sum_over_ranks(numbers: Tensor) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(numbers)
