"""What a step of pre-training leaves behind: the loss of its masked patches, to the last bit of a float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_dist.data.counts import COUNTERS
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.sinks import Sinks
from beit_dist.engine.step_log import Facts, LogSettings, StepLog, finite, norm_of, number, sum_over_ranks
from beit_dist.engine.validation import Validated, line_of


@dataclass(kw_only=True)
class StepFacts(Facts):
    """What the host knows about a step without asking the device."""

    masked: int
    """Masked patches in the global batch."""
    bad: int
    batch: str = ""
    """Digest of the global batch: its samples, epochs, masks and drop-path keeps, in hexadecimal."""


class Recorder(StepLog[StepFacts]):
    """Collects steps on every rank; rank 0 writes ``metrics.jsonl``, the metrics and the progress line.

    Args:
        run: the run folder.
        metrics: rank 0's metrics; None on the other ranks.
        settings: of the run.
        flops_per_sample: FLOPs of forward and backward for one image.
        sinks: what else takes the numbers, on rank 0.
        validates: the run measures a held-out loss.
    """

    SHOWN = ("loss", "accuracy", "lr", "grad_norm", "epoch")

    def __init__(
        self,
        run: RunFolder,
        metrics: Metrics | None,
        settings: LogSettings,
        *,
        flops_per_sample: int,
        sinks: Sinks | None = None,
        validates: bool = False,
    ) -> None:
        super().__init__(run, metrics, settings, sinks=sinks, validates=validates)
        self._flops = flops_per_sample

    def add(self, facts: StepFacts, loss_sum: Tensor, correct: Tensor, grad_norm: Tensor | float | None) -> bool:
        """Note a step; ``loss_sum`` and ``correct`` are this rank's sums and stay on the device.

        Returns:
            Whether it, and those noted before, were fetched now.
        """
        norm = norm_of(grad_norm, loss_sum.device)
        return self._note(facts, torch.stack([loss_sum.float(), correct.float(), norm]))

    def add_validation(self, step: int, samples: int, result: Validated) -> None:
        """Note a held-out result at once."""
        self._add_result(
            line_of(step, samples, self._attempt, result),
            {"beit_validation_loss": result.loss, "beit_validation_accuracy_ratio": result.accuracy},
            {"validation/loss": result.loss, "validation/accuracy": result.accuracy},
            f"held-out loss {result.loss:.4f}  accuracy {100 * result.accuracy:.1f} %",
            result.seconds,
        )

    def has_validation(self, step: int) -> bool:
        """Rank 0: whether the held-out result of ``step`` is on the disk."""
        if self._results is None:
            return False
        with self._results.path.open("rb") as lines:
            return any(json.loads(line)["step"] == step for line in lines)

    def _over_ranks(self, numbers: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        local = torch.stack([own for (own,) in numbers])  # (steps, 3)
        sums, norms = local[:, :2].contiguous(), local[:, 2]
        sum_over_ranks(sums)
        return sums, norms

    def _line(self, fact: StepFacts, *numbers: Any) -> dict[str, Any]:
        (loss_sum, correct), norm = numbers
        count = np.float32(max(1, fact.masked))
        # float() of a float32 is exact and json writes the shortest text that reads back as it: nothing is lost.
        return {
            "loss": finite(float(loss_sum / count)),
            "accuracy": finite(float(correct / count)),
            "grad_norm": finite(float(norm)),
            "masked": fact.masked,
            "bad": fact.bad,
            "batch": fact.batch,
        }

    def _exported(
        self, metrics: Metrics, facts: list[StepFacts], line: dict[str, Any], speed: float
    ) -> dict[str, float]:
        metrics.add("beit_train_masked_patches", sum(fact.masked for fact in facts))
        metrics.add("beit_data_bad_samples", sum(fact.bad for fact in facts))
        for name, (counts, label) in COUNTERS.items():
            for value, count in counts.take().items():
                metrics.add(name, count, **{label: value})
        return {
            "beit_train_loss": number(line["loss"]),
            "beit_train_accuracy_ratio": number(line["accuracy"]),
            "beit_train_model_flops_per_second": speed * self._flops,
        }

    def _text(self, line: dict[str, Any]) -> str:
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        return f"loss {loss}  accuracy {100 * number(line['accuracy']):.1f} %"
