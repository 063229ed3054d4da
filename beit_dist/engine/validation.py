"""Held-out loss: the same samples, masks and arithmetic every time; training does not notice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from beit_dist.config import TrainConfig, ValidationConfig
from beit_dist.data.lookahead import SamplesAhead
from beit_dist.data.masking import MaskGenerator
from beit_dist.data.pipeline import Failure, PartPipeline
from beit_dist.data.plan import Plan
from beit_dist.data.shards import Manifest
from beit_dist.data.storage import open_reader
from beit_dist.engine.distributed import Agreement
from beit_dist.engine.preemption import StopRequest


@dataclass(frozen=True)
class Validated:
    """A held-out result, the same on every rank."""

    loss: float
    """Mean cross-entropy of the masked patches of all samples, in nats."""
    accuracy: float
    """Share of them whose token was predicted right."""
    masked: int
    """Their number."""
    seconds: float


class Validation:
    """The loss on ``samples`` samples of a data set that is not trained on.

    Samples are the first of an order that depends on the data set and the seed only, each masked as in epoch 0 and
    without stochastic depth: neither time nor the number of ranks changes what is measured. Ranks take turns of a
    micro-batch. Nothing is drawn, no gradient is kept and no weight written, so training goes on as if it had not
    been there.

    Args:
        config: the recipe; its ``validation`` must be on.
        manifest: of the validation data.
        masks: the run's.
        rows: samples that a rank runs at once.
        agreement: the ranks.
        device: where the model is.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        masks: MaskGenerator,
        rows: int,
        agreement: Agreement,
        device: torch.device,
    ) -> None:
        self._agreement, self._device = agreement, device
        settings: ValidationConfig = config.validation
        self.samples = min(settings.samples, manifest.samples)
        self._every = settings.every_steps
        rank, self._batch = agreement.ranks.rank, rows * agreement.ranks.world
        self._rows = range(rank * rows, (rank + 1) * rows)
        sizes = [shard.samples for shard in manifest.view_shards(0)]
        self._reader = open_reader(str(settings.data), config.storage.access)
        self._pipeline = PartPipeline(
            reader=self._reader,
            manifest=manifest,
            plan=Plan(shard_samples=sizes, views=manifest.views, seed=config.seed, lanes=1),
            masks=masks,
            drop_path_rates=(),
            parts=[self._rows],
            per_lane=self._batch,
            consumed=0,
            slots=1,
            tolerant=False,
            ahead=SamplesAhead,
        )
        layout = self._pipeline.layout(rows)
        self._pipeline.memory = torch.empty(layout.nbytes, dtype=torch.uint8)
        self._tensors = layout.tensors(self._pipeline.memory)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether to measure after this step: at the interval, and after the last."""
        return step % self._every == 0 or step == total_steps

    @torch.no_grad()
    def measure(self, model: Any, stop: StopRequest, alive: Callable[[], None] = lambda: None) -> Validated | None:
        """The held-out loss now; None when a rank was asked to stop meanwhile. Collective.

        Args:
            model: the engine's module.
            stop: asked before each micro-batch.
            alive: called before each micro-batch.

        Raises:
            SampleError: a sample is damaged.
        """
        began = time.monotonic()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        self._pipeline.load_state_dict({"consumed": 0})
        parts = iter(self._pipeline)
        for first in range(0, self.samples, self._batch):
            if any(self._agreement.gather(stop.requested)):
                return None
            alive()
            part = next(parts)
            if isinstance(part, Failure):
                raise part.kind(part.text)
            # Rows behind the last sample are run too, since at ZeRO 3 all ranks must, but count nothing.
            self._tensors["positions"][max(0, self.samples - first - self._rows.start) :] = -1
            names = ("patches", "tokens", "positions")
            output = model(*(self._tensors[name].to(self._device) for name in names))
            sums += torch.stack([output.loss_sum, output.correct, output.count])
        found = self._agreement.gather(sums.tolist())
        loss, correct, masked = (math.fsum(column) for column in zip(*found, strict=True))
        return Validated(loss / masked, correct / masked, int(masked), time.monotonic() - began)

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


def line_of(step: int, samples: int, attempt: int, result: Validated) -> dict[str, Any]:
    """A result as ``validation.jsonl`` has it."""
    return {
        "step": step,
        "samples": samples,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "accuracy": result.accuracy,
        "masked": result.masked,
        "seconds": round(result.seconds, 3),
        "attempt": attempt,
    }
