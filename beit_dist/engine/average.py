"""An exponential moving average of the weights (EMA), kept in fp32 and spread over the ranks."""

from __future__ import annotations

import torch

from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import AVERAGE, Fragment


class WeightAverage:
    """After each update ``average ← decay · average + (1 − decay) · weight``, of the fp32 master weights.

    A rank averages the part of the weights that it saves: its partition at stages 1 to 3, and its 1/world share
    of each parameter at stage 0, where all ranks hold all weights. So the average costs 4 bytes a parameter over
    all ranks together, and needs no communication. It is saved with the state, and restored with it by name and
    interval on any number of ranks and at any stage.

    Args:
        state: the engine's; the average is attached to it, to be saved and restored.
        decay: share of the average that stays at an update.
    """

    def __init__(self, state: EngineState, decay: float) -> None:
        self._decay = decay
        owned = state.owned_weights()
        self._weights = [fragment.data for fragment in owned]
        self._averages = [torch.empty_like(weight) for weight in self._weights]
        pairs = zip(owned, self._averages, strict=True)
        state.attach(Fragment(weight.parameter, AVERAGE, weight.start, average) for weight, average in pairs)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are."""
        torch._foreach_copy_(self._averages, self._weights)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update; the host does not wait for the device."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)
