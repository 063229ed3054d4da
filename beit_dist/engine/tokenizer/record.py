"""What a step of a tokenizer's training leaves behind: the parts of its loss, and the codebook's use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_dist.engine.metrics import Metrics
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks
from beit_dist.engine.step_log import Facts, LogSettings, StepLog, finite, norm_of, number, sum_over_ranks
from beit_dist.engine.tokenizer.codebook import Codebook
from beit_dist.engine.tokenizer.quality import Quality

_LOSSES = ("loss", "nll", "kl", "usage_kl")


@dataclass(kw_only=True)
class StepFacts(Facts):
    """What the host knows about a step without asking the device."""

    temperature: float
    kl_weight: float


class TokenizerRecorder(StepLog[StepFacts]):
    """Collects steps on every rank; rank 0 writes ``metrics.jsonl``, the metrics and the progress line.

    Args:
        run: the run folder.
        metrics: rank 0's metrics; None on the other ranks.
        settings: of the run.
        codebook: told of each step's tokens, on rank 0.
        sinks: what else takes the numbers, on rank 0.
    """

    SHOWN = (*_LOSSES, "perplexity", "dead", "temperature", "lr", "grad_norm")

    def __init__(
        self,
        run: RunFolder,
        metrics: Metrics | None,
        settings: LogSettings,
        codebook: Codebook,
        sinks: Sinks | None = None,
    ) -> None:
        super().__init__(run, metrics, settings, sinks=sinks)
        self._codebook = codebook
        self._measured = _last_step(run.validation) if metrics is not None else 0

    def add(self, facts: StepFacts, losses: Tensor, counts: Tensor, grad_norm: Tensor | float | None) -> None:
        """Note a step.

        Args:
            losses: this rank's means of loss, likelihood, KL and usage KL, ``(4,)``; left on the device.
            counts: int64 ``(V,)``, how often each token was likeliest on this rank.
            grad_norm: over all ranks.
        """
        self._note(facts, torch.cat([losses.float(), norm_of(grad_norm, losses.device)[None]]), counts)

    def add_quality(self, step: int, quality: Quality, seconds: float) -> None:
        """Note at once what was measured on held-out images."""
        measured = {**asdict(quality), "dead": quality.dead}
        self._add_result(
            {"step": step, **measured, "attempt": self._attempt},
            {
                "beit_tokenizer_held_out_psnr_decibels": quality.psnr,
                "beit_tokenizer_held_out_perplexity": quality.perplexity,
                "beit_tokenizer_held_out_dead_tokens": quality.dead,
            },
            {f"held_out/{name}": measured[name] for name in ("psnr", "perplexity", "dead")},
            f"held out: PSNR {quality.psnr:.2f} dB  perplexity {quality.perplexity:.1f}  tokens in use "
            f"{quality.used} of {quality.vocabulary}",
            seconds,
            again=step <= self._measured,  # a start that finds nothing left to do measures once more
        )

    def _over_ranks(self, numbers: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        local, counts = (torch.stack(own) for own in zip(*numbers, strict=True))  # (steps, 5), (steps, V)
        losses, norms = local[:, :-1].contiguous(), local[:, -1]
        losses /= sum_over_ranks(losses)
        sum_over_ranks(counts)
        return losses, norms, counts

    def _line(self, fact: StepFacts, *numbers: Any) -> dict[str, Any]:
        losses, norm, counts = numbers
        self._codebook.take(fact.step, counts)
        # A float32 as a float is exact, and json writes the shortest text that reads back as it: nothing is lost.
        return {
            **{name: finite(float(value)) for name, value in zip(_LOSSES, losses, strict=True)},
            "perplexity": round(self._codebook.perplexity, 3),
            "dead": self._codebook.dead,
            "temperature": fact.temperature,
            "kl_weight": fact.kl_weight,
            "grad_norm": finite(float(norm)),
        }

    def _exported(
        self, metrics: Metrics, facts: list[StepFacts], line: dict[str, Any], speed: float
    ) -> dict[str, float]:
        return {
            **{f"beit_tokenizer_{name}": number(line[name]) for name in _LOSSES},
            "beit_tokenizer_perplexity": line["perplexity"],
            "beit_tokenizer_dead_tokens": line["dead"],
            "beit_tokenizer_temperature": line["temperature"],
            "beit_tokenizer_kl_weight": line["kl_weight"],
        }

    def _text(self, line: dict[str, Any]) -> str:
        return (
            f"loss {number(line['loss']):.4f}  KL {number(line['kl']):.2f} nats  perplexity "
            f"{line['perplexity']:.0f}  dead {line['dead']}  temperature {line['temperature']:.3f}"
        )


def _last_step(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
