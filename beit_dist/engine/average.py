"""An exponential moving average of the weights (EMA), kept in fp32 and spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.checkpoints.layout import AVERAGE, Fragment
from beit_dist.engine.checkpoint.fragments import EngineState


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
        self.fragments = [Fragment(own.parameter, AVERAGE, own.start, average) for own, average in pairs]
        state.attach(self.fragments)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are."""
        torch._foreach_copy_(self._averages, self._weights)

    @torch.no_grad()
    def update(self, most: float = 1.0) -> None:
        """Take in the weights after an update; the host does not wait for the device.

        Args:
            most: a limit of the decay, with which a young average leaves its start behind.
        """
        torch._foreach_lerp_(self._averages, self._weights, 1 - min(self._decay, most))


@torch.no_grad()
def gathered(
    fragments: Iterable[Fragment], shapes: Mapping[str, Sequence[int]], device: torch.device
) -> dict[str, Tensor]:
    """Whole fp32 tensors by parameter, of the fragments that the ranks hold between them. Collective.

    Args:
        fragments: this rank's; each value is held by one rank.
        shapes: of all parameters, in the same order on every rank.
        device: where the fragments are.
    """
    whole = {name: torch.zeros(tuple(shape), device=device) for name, shape in shapes.items()}
    for fragment in fragments:
        whole[fragment.parameter].view(-1)[fragment.start : fragment.start + fragment.length] = fragment.data
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in whole.values():  # what the others hold is zero here, so the sum is exact
            dist.all_reduce(tensor)
    return whole
