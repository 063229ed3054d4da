"""The average token distribution of a whole batch, which the usage term of the loss is about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from beit_dist.models.dvae_objective import average_usage, mapped_pixels

Widen = Callable[[Tensor], Tensor]
"""From the average token distribution ``(V,)`` of a micro-batch to that of the batch."""


class Usage:
    """How the usage term gets the distribution of the whole batch, so that it depends on neither ranks nor cuts.

    Args:
        world: number of ranks.
        wanted: the term has a weight.
        others_wait: around what waits for other ranks.
    """

    def __init__(self, world: int, wanted: bool, others_wait: Callable[[], AbstractContextManager[None]]) -> None:
        self._world, self._wanted, self._others_wait = world, wanted, others_wait

    def of_batch(
        self, micro_batches: list[Tensor], encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    ) -> Widen:
        """For the forward passes of a step. Collective, here or in the first of them.

        With one micro-batch a rank, what the forward pass gives anyway is averaged over the ranks. With more, the
        encoder runs once over all of them before.

        Args:
            micro_batches: this rank's uint8 images ``(B, 3, H, W)``.
            encode: logits of mapped pixels.
        """
        if len(micro_batches) == 1 or not self._wanted:
            return self._over_ranks
        with torch.no_grad():
            logits = (encode(mapped_pixels(images))[0].float() for images in micro_batches)
            usages = [average_usage(torch.log_softmax(some, dim=1)) for some in logits]
        whole = self._over_ranks(torch.stack(usages).mean(0))
        return lambda _: whole

    def _over_ranks(self, usage: Tensor) -> Tensor:
        if self._world > 1:
            usage = usage.clone()
            with self._others_wait():
                dist.all_reduce(usage)
            usage /= self._world
        return usage
