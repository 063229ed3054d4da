"""What a step of a tokenizer's training leaves behind: a line, metrics, and the codebook's use."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.engine.lines import Lines
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks
from beit_dist.engine.tokenizer.codebook import Codebook
from beit_dist.engine.tokenizer.quality import Quality
from beit_dist.tokenizer_config import TokenizerRecipe

_LOG_LINES = 20
"""Progress lines of a whole training, when they do not go to a terminal."""
_LOSSES = ("loss", "nll", "kl", "usage_kl")


@dataclass
class StepFacts:
    """What the host knows about a step without asking the device."""

    step: int
    epoch: float
    """Passes over the images, with fraction."""
    lr: float
    temperature: float
    kl_weight: float
    applied: bool
    """False: the gradients were not finite and nothing was updated."""
    wait_seconds: float
    """How long this rank waited for the step's images."""


class TokenizerRecorder:
    """Collects steps on every rank; rank 0 writes ``metrics.jsonl``, the metrics and the progress line.

    Args:
        metrics: rank 0's metrics; None on the other ranks.
        codebook: told of each step's tokens, on rank 0.
        attempt: number of this start of the run.
        sinks: what else takes the numbers, on rank 0.
    """

    def __init__(
        self,
        run: RunFolder,
        metrics: Metrics | None,
        codebook: Codebook,
        recipe: TokenizerRecipe,
        attempt: int,
        sinks: Sinks | None = None,
    ) -> None:
        self._metrics, self._codebook, self._recipe, self._attempt = metrics, codebook, recipe, attempt
        self._sinks = sinks or Sinks()
        self._facts: list[StepFacts] = []
        self._numbers: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._lines = Lines(run.metrics) if metrics is not None else None
        self._measured = _last_step(run.validation) if metrics is not None else 0
        self._results = Lines(run.validation) if metrics is not None else None
        self._since = time.perf_counter()
        self._terminal = sys.stdout.isatty()

    def add(self, facts: StepFacts, losses: Tensor, counts: Tensor, grad_norm: Tensor | float | None) -> None:
        """Note a step.

        Args:
            losses: this rank's means of loss, likelihood, KL and usage KL, ``(4,)``; left on the device.
            counts: int64 ``(V,)``, how often each token was likeliest on this rank.
            grad_norm: over all ranks.
        """
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, dtype=torch.float32)
        self._facts.append(facts)
        self._numbers.append(torch.cat([losses.float(), norm.to(losses.device)[None]]))
        self._counts.append(counts)
        if len(self._facts) >= self._recipe.logging.every_steps:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Fetch the noted steps (collective: two small sums over the ranks) and write them out.

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

    def add_quality(self, step: int, quality: Quality, seconds: float) -> None:
        """Write what was measured on held-out images to ``validation.jsonl`` and the metrics, at once."""
        if self._metrics is None or self._results is None:
            return
        measured = {**asdict(quality), "dead": quality.dead}
        if step > self._measured:  # a start that finds nothing left to do measures once more
            self._results.add(json.dumps({"step": step, **measured, "attempt": self._attempt}))
            self._results.flush()
        self._metrics.set(
            {
                "beit_tokenizer_held_out_psnr_decibels": quality.psnr,
                "beit_tokenizer_held_out_perplexity": quality.perplexity,
                "beit_tokenizer_held_out_dead_tokens": quality.dead,
                "beit_validation_step": step,
            }
        )
        self._metrics.observe("beit_validation_duration_seconds", seconds)
        self._sinks.write(step, {f"held_out/{name}": measured[name] for name in ("psnr", "perplexity", "dead")})
        self._say(
            f"step {step}  held out: PSNR {quality.psnr:.2f} dB  perplexity {quality.perplexity:.1f}  tokens in "
            f"use {quality.used} of {quality.vocabulary}",
            whole=True,
        )

    def close(self) -> None:
        """Write what is noted and end the progress line."""
        self._sinks.close()
        for lines in (self._lines, self._results):
            if lines is not None:
                lines.close()
        if self._lines is not None and self._recipe.logging.progress and self._terminal:
            print(flush=True)

    def _fetch(self) -> None:
        numbers, counts = torch.stack(self._numbers), torch.stack(self._counts)
        norms = numbers[:, -1].cpu()
        losses = numbers[:, :-1].contiguous()
        if dist.is_initialized() and (world := dist.get_world_size()) > 1:
            dist.all_reduce(losses)
            losses /= world
            dist.all_reduce(counts)
        facts, self._facts, self._numbers, self._counts = self._facts, [], [], []
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        if self._metrics is None or self._lines is None:
            return
        line: dict[str, Any] = {}
        for fact, loss, norm, used in zip(
            facts, losses.tolist(), norms.tolist(), counts.cpu().numpy(), strict=True
        ):
            self._codebook.take(fact.step, used)
            line = self._line(fact, loss, norm)
            self._lines.add(json.dumps(line))
            names = (*_LOSSES, "perplexity", "dead", "temperature", "lr", "grad_norm")
            self._sinks.write(fact.step, {f"train/{name}": line[name] for name in names})
        self._lines.flush()
        self._export(self._metrics, facts, line, seconds)

    def _line(self, fact: StepFacts, losses: list[float], norm: float) -> dict[str, Any]:
        # A float32 as a float is exact, and json writes the shortest text that reads back as it: nothing is lost.
        return {
            "step": fact.step,
            "samples": fact.step * self._recipe.batch,
            "epoch": round(fact.epoch, 6),
            **{name: _finite(value) for name, value in zip(_LOSSES, losses, strict=True)},
            "perplexity": round(self._codebook.perplexity, 3),
            "dead": self._codebook.dead,
            "temperature": fact.temperature,
            "kl_weight": fact.kl_weight,
            "lr": fact.lr,
            "grad_norm": _finite(norm),
            "skipped": not fact.applied,
            "attempt": self._attempt,
        }

    def _export(self, metrics: Metrics, facts: list[StepFacts], line: dict[str, Any], seconds: float) -> None:
        seconds, batch = max(seconds, 1e-9), self._recipe.batch
        speed = len(facts) * batch / seconds
        metrics.add("beit_train_steps", len(facts))
        metrics.add("beit_train_steps_skipped", sum(not fact.applied for fact in facts))
        metrics.add("beit_train_samples", len(facts) * batch)
        metrics.set(
            {
                **{f"beit_tokenizer_{name}": _number(line[name]) for name in _LOSSES},
                "beit_tokenizer_perplexity": line["perplexity"],
                "beit_tokenizer_dead_tokens": line["dead"],
                "beit_tokenizer_temperature": line["temperature"],
                "beit_tokenizer_kl_weight": line["kl_weight"],
                "beit_train_epoch": line["epoch"],
                "beit_train_grad_norm": _number(line["grad_norm"]),
                "beit_train_learning_rate": line["lr"],
                "beit_train_samples_per_second": speed,
                "beit_train_last_step_timestamp_seconds": time.time(),
                "beit_data_wait_ratio": min(1.0, sum(fact.wait_seconds for fact in facts) / seconds),
            }
        )
        self._sinks.write(line["step"], {"speed/samples_per_second": speed})
        steps, step = self._recipe.steps, line["step"]
        every = max(1, steps // _LOG_LINES)
        if self._terminal or step // every > (step - len(facts)) // every or step == len(facts):
            self._say(
                f"step {step}/{steps}  loss {_number(line['loss']):.4f}  KL {_number(line['kl']):.2f} nats  "
                f"perplexity {line['perplexity']:.0f} of {self._recipe.model.vocabulary}  dead {line['dead']}  "
                f"temperature {line['temperature']:.3f}  {speed:.0f} images/s  "
                f"left {_clock((steps - step) * seconds / len(facts))}",
                whole=not self._terminal,
            )

    def _say(self, text: str, whole: bool) -> None:
        """A line on a terminal that the next one replaces, or a ``whole`` one that stays."""
        if self._recipe.logging.progress:
            print(f"\r\033[K{text}" if self._terminal else text, end="\n" if whole else "", flush=True)


def _last_step(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
