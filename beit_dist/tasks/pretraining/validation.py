"""Held-out loss: the same samples, masks and arithmetic every time; training does not notice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.task import Surroundings
from beit_dist.step_numbers import Number
from beit_dist.stream.lookahead import SamplesAhead
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.parts import Failure
from beit_dist.stream.pipeline import PartPipeline
from beit_dist.stream.plan import Plan
from beit_dist.stream.readers import open_reader
from beit_dist.tasks.pretraining.dataset import HeldOut


class Validation:
    """The loss on ``samples`` samples of a data set that is not trained on.

    Samples are the first of an order that depends on the data set and the seed only, each masked as in epoch 0 and
    without stochastic depth: neither time nor the number of ranks changes what is measured. Ranks take turns of a
    micro-batch. Nothing is drawn, no gradient is kept and no weight written, so training continues as if
    it had not been there.

    Args:
        config: the recipe.
        held_out: what is measured on.
        masks: the run's.
        measured: what the model sums over the masked patches.
        around: ranks and device.
    """

    def __init__(
        self,
        config: PretrainingConfig,
        held_out: HeldOut,
        masks: Masks,
        measured: Sequence[Number],
        around: Surroundings,
    ) -> None:
        self._around, self._measured = around, measured
        manifest = held_out.manifest
        self.samples = min(config.validation.samples, manifest.samples)
        rank, rows = around.ranks.rank, around.resolved.micro_batch
        self._batch = rows * around.ranks.world
        self._rows = range(rank * rows, (rank + 1) * rows)
        sizes = [shard.samples for shard in manifest.view_shards(0)]
        self._reader = open_reader(held_out.data, config.storage.access)
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

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Any] | None:
        """The held-out numbers now, and the masked patches; None when a rank was asked to stop. Collective.

        Args:
            model: the engine's module.

        Raises:
            SampleError: a sample is damaged.
        """
        agreement, device, masked = self._around.agreement, self._around.device, 0
        sums = torch.zeros(len(self._measured), dtype=torch.float64, device=device)
        self._pipeline.load_state_dict({"consumed": 0})
        parts = iter(self._pipeline)
        for first in range(0, self.samples, self._batch):
            if any(agreement.gather(self._around.stop.requested)):
                return None
            self._around.alive()
            part = next(parts)
            if isinstance(part, Failure):
                raise part.kind(part.text)
            # Rows behind the last sample are run too, since at ZeRO 3 all ranks must, but count nothing.
            self._tensors["positions"][max(0, self.samples - first - self._rows.start) :] = -1
            masked += int((self._tensors["positions"] >= 0).sum())
            names = ("patches", "tokens", "positions")
            output = model(*(self._tensors[name].to(device) for name in names))
            sums += torch.stack(output)
        found = agreement.gather([*sums.tolist(), masked])
        *totals, count = (math.fsum(column) for column in zip(*found, strict=True))
        numbers = {number.name: total / count for number, total in zip(self._measured, totals, strict=True)}
        return {**numbers, "masked": int(count)}

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()
