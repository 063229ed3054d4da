"""The model that is measured: the engine's, or one of its own with the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from beit_dist.engine.precision import LOW
from beit_dist.engine.task import Running, Surroundings, Task
from beit_dist.models.buffers import keep_in_fp32, kept_buffers


class MeasuredModel:
    """A model in evaluation mode, in the precision of the training.

    The engine's own where that is whole. With an average of the weights, or at ZeRO stage 3, where ranks that
    measure differently many images would wait for each other for ever, it is a copy.

    Args:
        task: whose model it is.
        running: the engine.
        around: device and precision.
    """

    def __init__(self, task: Task[Any, Any, Any], running: Running, around: Surroundings) -> None:
        self._running = running
        self._copy: nn.Module | None = None
        if task.config.ema.decay is not None or around.resolved.stage == 3:
            model = task.model().requires_grad_(False)
            model = model.to(around.device, LOW.get(around.resolved.precision, torch.float32)).eval()
            keep_in_fp32(model)
            self._copy = model

    @contextmanager
    def now(self) -> Iterator[nn.Module]:
        """The model with the weights as they are. Collective."""
        trained: nn.Module = self._running.engine.module
        if self._copy is None:
            trained.eval()
            try:
                yield trained
            finally:
                trained.train()
            return
        self._copy.load_state_dict({**self._running.weights(), **kept_buffers(trained)})
        yield self._copy
