"""What a step leaves behind: numbers stay on the device until the logging interval, then go to all who ask."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.data.counts import COUNTERS
from beit_dist.engine.lines import Lines
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks
from beit_dist.engine.validation import Validated, line_of


@dataclass
class StepFacts:
    """What the host knows about a step without asking the device."""

    step: int
    samples: int
    """Samples trained on up to and including this step."""
    epoch: float
    lr: float
    masked: int
    """Masked patches in the global batch."""
    bad: int
    applied: bool
    """False: the gradients were not finite and nothing was updated."""
    wait_seconds: float
    """How long this rank waited for the step's data."""
    batch: str = ""
    """Digest of the global batch: its samples, epochs, masks and drop-path keeps, in hexadecimal."""


class Recorder:
    """Collects steps on every rank; rank 0 writes ``metrics.jsonl``, the metrics and the progress line.

    Args:
        run: the run folder.
        metrics: rank 0's metrics; None on the other ranks.
        every: steps between fetches.
        attempt: number of this start of the run.
        total_steps: steps at which the run is done.
        global_batch: samples of a step.
        flops_per_sample: FLOPs of forward and backward for one image.
        progress: show a progress line.
        sinks: what else takes the numbers, on rank 0.
        validates: the run measures a held-out loss.
    """

    def __init__(
        self,
        run: RunFolder,
        metrics: Metrics | None,
        *,
        every: int,
        attempt: int,
        total_steps: int,
        global_batch: int,
        flops_per_sample: int,
        progress: bool,
        sinks: Sinks | None = None,
        validates: bool = False,
    ) -> None:
        self._metrics, self._sinks = metrics, sinks or Sinks()
        self._every = every
        self._attempt = attempt
        self._total_steps = total_steps
        self._global_batch = global_batch
        self._flops = flops_per_sample
        self._progress = progress
        self._facts: list[StepFacts] = []
        self._numbers: list[Tensor] = []
        self._lines = Lines(run.metrics) if metrics is not None else None
        self._results = Lines(run.validation) if metrics is not None and validates else None
        self._since = time.perf_counter()
        self.last_loss = math.nan
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # rank 0: told of every line that is written

    def add(self, facts: StepFacts, loss_sum: Tensor, correct: Tensor, grad_norm: Tensor | float | None) -> bool:
        """Note a step; ``loss_sum`` and ``correct`` are this rank's sums and stay on the device.

        Returns:
            Whether it, and those noted before, were fetched now.
        """
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, dtype=torch.float32)
        self._facts.append(facts)
        self._numbers.append(torch.stack([loss_sum.float(), correct.float(), norm.to(loss_sum.device)]))
        if len(self._facts) < self._every:
            return False
        self.flush()
        return True

    def flush(self, durable: bool = False) -> None:
        """Fetch the noted steps (collective: one small sum over the ranks) and write them out.

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

    def add_validation(self, step: int, samples: int, result: Validated) -> None:
        """Write a held-out result to ``validation.jsonl`` and the metrics, at once."""
        if self._metrics is None or self._results is None:
            return
        self._results.add(json.dumps(line_of(step, samples, self._attempt, result)))
        self._results.flush()
        self._metrics.set(
            {
                "beit_validation_loss": result.loss,
                "beit_validation_accuracy_ratio": result.accuracy,
                "beit_validation_step": step,
            }
        )
        self._metrics.observe("beit_validation_duration_seconds", result.seconds)
        self._sinks.write(step, {"validation/loss": result.loss, "validation/accuracy": result.accuracy})
        if self._progress:
            text = f"step {step}  held-out loss {result.loss:.4f}  accuracy {100 * result.accuracy:.1f} %"
            print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)

    def has_validation(self, step: int) -> bool:
        """Rank 0: whether the held-out result of ``step`` is on the disk."""
        if self._results is None:
            return False
        with self._results.path.open("rb") as lines:
            return any(json.loads(line)["step"] == step for line in lines)

    def pause(self) -> None:
        """What happened since the last flush, a save for instance, does not count as training time."""
        if not self._facts:
            self._since = time.perf_counter()

    def _fetch(self) -> None:
        local = torch.stack(self._numbers)  # (steps, 3)
        norms = local[:, 2].cpu()
        sums = local[:, :2].contiguous()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        facts, self._facts, self._numbers = self._facts, [], []
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        if self._metrics is None or self._lines is None:
            return
        line: dict[str, Any] = {}
        for fact, (loss_sum, correct), norm in zip(facts, sums.cpu().numpy(), norms.tolist(), strict=True):
            line = self._line(fact, loss_sum, correct, norm)
            self._lines.add(json.dumps(line))
            names = ("loss", "accuracy", "lr", "grad_norm", "epoch")
            self._sinks.write(fact.step, {f"train/{name}": line[name] for name in names})
            for listener in self.listeners:
                listener(line)
        self._lines.flush()
        self.last_loss = float(line["loss"]) if line["loss"] is not None else math.nan
        self._export(facts, line, seconds)

    def close(self) -> None:
        """Write what is noted and end the progress line."""
        self._sinks.close()
        for lines in (self._lines, self._results):
            if lines is not None:
                lines.close()
        if self._lines is not None and self._progress and sys.stdout.isatty():
            print(flush=True)

    def _line(self, fact: StepFacts, loss_sum: np.float32, correct: np.float32, norm: float) -> dict[str, Any]:
        count = np.float32(max(1, fact.masked))
        # float() of a float32 is exact and json writes the shortest text that reads back as it: nothing is lost.
        return {
            "step": fact.step,
            "samples": fact.samples,
            "epoch": round(fact.epoch, 6),
            "loss": _finite(float(loss_sum / count)),
            "accuracy": _finite(float(correct / count)),
            "lr": fact.lr,
            "grad_norm": _finite(norm),
            "masked": fact.masked,
            "bad": fact.bad,
            "skipped": not fact.applied,
            "batch": fact.batch,
            "attempt": self._attempt,
        }

    def _export(self, facts: list[StepFacts], line: dict[str, Any], seconds: float) -> None:
        assert self._metrics is not None  # rank 0 only; for the type checker
        speed = len(facts) * self._global_batch / max(seconds, 1e-9)
        wait = min(1.0, sum(fact.wait_seconds for fact in facts) / max(seconds, 1e-9))
        self._metrics.add("beit_train_steps", len(facts))
        self._metrics.add("beit_train_steps_skipped", sum(not fact.applied for fact in facts))
        self._metrics.add("beit_train_samples", len(facts) * self._global_batch)
        self._metrics.add("beit_train_masked_patches", sum(fact.masked for fact in facts))
        self._metrics.add("beit_data_bad_samples", sum(fact.bad for fact in facts))
        for name, (counts, label) in COUNTERS.items():
            for value, count in counts.take().items():
                self._metrics.add(name, count, **{label: value})
        self._metrics.set(
            {
                "beit_train_epoch": line["epoch"],
                "beit_train_loss": _number(line["loss"]),
                "beit_train_accuracy_ratio": _number(line["accuracy"]),
                "beit_train_grad_norm": _number(line["grad_norm"]),
                "beit_train_learning_rate": line["lr"],
                "beit_train_samples_per_second": speed,
                "beit_train_model_flops_per_second": speed * self._flops,
                "beit_train_last_step_timestamp_seconds": time.time(),
                "beit_data_wait_ratio": wait,
            }
        )
        self._sinks.write(line["step"], {"speed/samples_per_second": speed, "speed/data_wait": wait})
        if self._progress:
            left = (self._total_steps - line["step"]) * seconds / len(facts)
            loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
            text = (
                f"step {line['step']}/{self._total_steps}  epoch {line['epoch']:.2f}  loss {loss}  "
                f"accuracy {100 * _number(line['accuracy']):.1f} %  lr {line['lr']:.2e}  {speed:.0f} images/s  "
                f"data wait {100 * wait:.1f} %  left {_clock(left)}"
            )
            terminal = sys.stdout.isatty()
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
