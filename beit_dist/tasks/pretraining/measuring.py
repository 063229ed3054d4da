"""What a pre-training measures while it trains: the loss of held-out images, and probes of its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.task import Surroundings
from beit_dist.models.heads.targets import head_of
from beit_dist.probing.pictures import Pictures
from beit_dist.stream.masking.base import Masks
from beit_dist.tasks.pretraining.dataset import HeldOut
from beit_dist.tasks.pretraining.probe import Probe
from beit_dist.tasks.pretraining.validation import Validation


class Measuring:
    """Measures each at its own steps, and both after the last one.

    Args:
        config: the recipe.
        held_out: shards that are not trained on, if there are any.
        labelled: images that are probed with, if there are any.
        masks: the run's.
        around: ranks and device.
    """

    def __init__(
        self,
        config: PretrainingConfig,
        held_out: HeldOut | None,
        labelled: Pictures | None,
        masks: Masks,
        around: Surroundings,
    ) -> None:
        self._config = config
        self._loss: Validation | None = None
        self._probe: Probe | None = None
        if held_out is not None:
            self._loss = Validation(config, held_out, masks, head_of(config.model).numbers, around)
        if labelled is not None:
            self._probe = Probe(config, labelled, around)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether something is measured after a step of a run of so many."""
        return self._loss_is_due(step, steps) or self._probe_is_due(step, steps)

    def measure(
        self, step: int, steps: int, model: nn.Module, weights: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Any] | None:
        """What is due after a step; None when a rank was asked to stop meanwhile. Collective.

        Args:
            model: the engine's.
            weights: gives the whole fp32 weights on every rank.
        """
        values: dict[str, Any] = {}
        if self._loss is not None and self._loss_is_due(step, steps):
            measured = self._loss.measure(model)
            if measured is None:
                return None
            values |= measured
        if self._probe is not None and self._probe_is_due(step, steps):
            probed = self._probe.measure(weights)
            if probed is None:
                return None
            values |= probed
        return values

    def close(self) -> None:
        """Close the shards."""
        if self._loss is not None:
            self._loss.close()

    def _loss_is_due(self, step: int, steps: int) -> bool:
        return self._loss is not None and (step == steps or step % self._config.measured_every(steps) == 0)

    def _probe_is_due(self, step: int, steps: int) -> bool:
        return self._probe is not None and (step == steps or step % self._config.probed_every(steps) == 0)
