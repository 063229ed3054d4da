"""What both loops do with the numbers of their steps: these stay on the device until the logging interval.

Then they are fetched together, summed over the ranks, and go to all who ask: ``metrics.jsonl``, the metrics, the
sinks, the progress line. What the numbers are, a loop's own recorder says.
"""

from __future__ import annotations

import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.engine.lines import Lines
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks


@dataclass(kw_only=True)
class Facts:
    """What the host knows about a step without asking the device."""

    step: int
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
class LogSettings:
    """What a run's numbers are counted by, and when they are looked at."""

    every: int
    """Steps between fetches."""
    attempt: int
    """Number of this start of the run."""
    total_steps: int
    """Steps at which the run is done."""
    batch: int
    """Samples of a step, over all ranks."""
    progress: bool
    """Show a progress line."""
    log_lines: int | None = None
    """Progress lines of a whole run at most, when they do not go to a terminal; None: one for each fetch."""


AnyFacts = TypeVar("AnyFacts", bound=Facts)


class StepLog(ABC, Generic[AnyFacts]):
    """Collects steps on every rank; rank 0 writes ``metrics.jsonl``, the metrics and the progress line.

    Args:
        run: the run folder.
        metrics: rank 0's metrics; None on the other ranks.
        settings: of the run.
        sinks: what else takes the numbers, on rank 0.
        validates: the run measures on held-out data.
    """

    SHOWN: ClassVar[tuple[str, ...]]
    """Names in a line that the sinks get."""

    def __init__(
        self,
        run: RunFolder,
        metrics: Metrics | None,
        settings: LogSettings,
        *,
        sinks: Sinks | None = None,
        validates: bool = True,
    ) -> None:
        self._metrics, self._sinks = metrics, sinks or Sinks()
        self._settings, self._attempt = settings, settings.attempt
        self._terminal = sys.stdout.isatty()
        self._say_every = max(1, settings.total_steps // settings.log_lines) if settings.log_lines else 1
        self._facts: list[AnyFacts] = []
        self._numbers: list[Sequence[Tensor]] = []
        self._lines = Lines(run.metrics) if metrics is not None else None
        self._results = Lines(run.validation) if metrics is not None and validates else None
        self._since = time.perf_counter()
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # rank 0: told of every line that is written

    @abstractmethod
    def _over_ranks(self, numbers: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        """The noted steps' numbers over all ranks, still on the device, each with the steps first. Collective."""

    @abstractmethod
    def _line(self, fact: AnyFacts, *numbers: Any) -> dict[str, Any]:
        """What a step's line in ``metrics.jsonl`` says of this loop: the gradient's norm, and more."""

    @abstractmethod
    def _exported(
        self, metrics: Metrics, facts: list[AnyFacts], line: dict[str, Any], speed: float
    ) -> dict[str, float]:
        """Count in the metrics what is special to this loop; its gauges, from the newest line."""

    @abstractmethod
    def _text(self, line: dict[str, Any]) -> str:
        """The newest line in a few words, for the progress line."""

    def _note(self, facts: AnyFacts, *numbers: Tensor) -> bool:
        """Note a step, its numbers still on the device; whether it, and those noted before, were fetched now."""
        self._facts.append(facts)
        self._numbers.append(numbers)
        if len(self._facts) < self._settings.every:
            return False
        self.flush()
        return True

    def flush(self, durable: bool = False) -> None:
        """Fetch the noted steps (collective: small sums over the ranks) and write them out.

        Args:
            durable: also make the lines survive a power loss, as a checkpoint that follows them does.
        """
        if self._facts:
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
        if not self._facts:
            self._since = time.perf_counter()

    def close(self) -> None:
        """Write what is noted and end the progress line."""
        self._sinks.close()
        for lines in (self._lines, self._results):
            if lines is not None:
                lines.close()
        if self._lines is not None and self._settings.progress and self._terminal:
            print(flush=True)

    def _add_result(
        self,
        line: Mapping[str, Any],
        gauges: Mapping[str, float],
        shown: Mapping[str, float],
        text: str,
        seconds: float,
        *,
        again: bool = False,
    ) -> None:
        """Write what was measured on held-out data, on rank 0 and at once.

        Args:
            line: for ``validation.jsonl``.
            gauges: for the metrics.
            shown: for the sinks.
            text: for the progress line.
            seconds: how long it took.
            again: the file has a line of this step already.
        """
        if self._metrics is None or self._results is None:
            return
        if not again:
            self._results.add(json.dumps(line))
            self._results.flush()
        self._metrics.set({**gauges, "beit_validation_step": line["step"]})
        self._metrics.observe("beit_validation_duration_seconds", seconds)
        self._sinks.write(line["step"], shown)
        self._say(f"step {line['step']}  {text}", stays=True)

    def _fetch(self) -> None:
        facts, numbers = self._facts, self._numbers
        self._facts, self._numbers = [], []
        summed = self._over_ranks(numbers)
        if self._metrics is None or self._lines is None:
            return  # without waiting for the device
        fetched = [each.cpu().numpy() for each in summed]
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        line: dict[str, Any] = {}
        for fact, *own in zip(facts, *fetched, strict=True):
            line = {
                "step": fact.step,
                "samples": fact.samples,
                "epoch": round(fact.epoch, 6),
                **self._line(fact, *own),
                "lr": fact.lr,
                "skipped": not fact.applied,
                "attempt": self._attempt,
            }
            self._lines.add(json.dumps(line))
            self._sinks.write(fact.step, {f"train/{name}": line[name] for name in self.SHOWN})
            for listener in self.listeners:
                listener(line)
        self._lines.flush()
        self._export(self._metrics, facts, line, seconds)

    def _export(self, metrics: Metrics, facts: list[AnyFacts], line: dict[str, Any], seconds: float) -> None:
        speed = len(facts) * self._settings.batch / seconds
        wait = min(1.0, sum(fact.wait_seconds for fact in facts) / seconds)
        metrics.add("beit_train_steps", len(facts))
        metrics.add("beit_train_steps_skipped", sum(not fact.applied for fact in facts))
        metrics.add("beit_train_samples", len(facts) * self._settings.batch)
        metrics.set(
            {
                **self._exported(metrics, facts, line, speed),
                "beit_train_epoch": line["epoch"],
                "beit_train_grad_norm": number(line["grad_norm"]),
                "beit_train_learning_rate": line["lr"],
                "beit_train_samples_per_second": speed,
                "beit_train_last_step_timestamp_seconds": time.time(),
                "beit_data_wait_ratio": wait,
            }
        )
        self._sinks.write(line["step"], {"speed/samples_per_second": speed, "speed/data_wait": wait})
        step, every = line["step"], self._say_every
        first = step == len(facts)
        if self._terminal or first or step // every > (step - len(facts)) // every:
            left = (self._settings.total_steps - step) * seconds / len(facts)
            self._say(
                f"step {step}/{self._settings.total_steps}  epoch {line['epoch']:.2f}  {self._text(line)}  "
                f"lr {line['lr']:.2e}  {speed:.0f} images/s  data wait {100 * wait:.1f} %  left {_clock(left)}",
                stays=not self._terminal,
            )

    def _say(self, text: str, stays: bool) -> None:
        """A line on a terminal that the next one replaces, or one that ``stays``."""
        if self._settings.progress:
            print(f"\r\033[K{text}" if self._terminal else text, end="\n" if stays else "", flush=True)


def norm_of(grad_norm: Tensor | float | None, device: torch.device) -> Tensor:
    """A gradient's norm as DeepSpeed tells it, as a float32 scalar on ``device``; NaN when it tells none."""
    return torch.as_tensor(math.nan if grad_norm is None else grad_norm, dtype=torch.float32).to(device)


def sum_over_ranks(numbers: Tensor) -> int:
    """Sum ``numbers`` over the ranks, in place; how many ranks there are."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        dist.all_reduce(numbers)
    return world


def finite(value: float) -> float | None:
    """For JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def number(value: float | None) -> float:
    """The reverse of :func:`finite`."""
    return math.nan if value is None else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
