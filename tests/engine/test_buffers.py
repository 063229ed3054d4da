"""What a model keeps besides its parameters stays fp32, and is part of every checkpoint."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit_dist.checkpoints.layout import BUFFER
from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.run import CheckpointConfig
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.optimizers.table import build_optimizer
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.resolve import resolve
from beit_dist.engine.wrapped import initialize_engine
from beit_dist.models.buffers import kept_buffers
from beit_dist.storage.local import LocalPlace

pytestmark = pytest.mark.slow


class Counted(nn.Linear):
    """A layer with a buffer to keep, and one that can be computed anew."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("constant", torch.ones(4, dtype=torch.int64), persistent=False)


def built(stage: int, precision: str) -> tuple[Any, EngineState]:
    """An engine around such a layer."""
    config = PretrainingConfig(run="run", global_batch=2, micro_batch=2)
    settings = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}}
    model = Counted()
    groups = [{"name": "all", "params": list(model.named_parameters()), "weight_decay": 0.0}]
    engine = initialize_engine(model, build_optimizer(groups, OptimizerConfig()), resolve(config, settings, 1))
    return engine, EngineState(engine, Ranks())


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16")])
def test_buffers_are_saved_and_restored_to_the_last_bit(
    joined: torch.device, tmp_path: Path, stage: int, precision: str
) -> None:
    engine, state = built(stage, precision)
    assert engine.module.mean.dtype == torch.float32
    third = torch.full((4,), 1 / 3)  # which bf16 cannot hold
    engine.module.mean.copy_(third)
    store = CheckpointStore(LocalPlace(tmp_path), CheckpointConfig(), Agreement(Ranks(), timedelta(seconds=60)))
    store.begin_attempt()
    store.begin_save(1, state, {})
    result = store.finish_save()
    assert result is not None
    assert result.ok, result.fault

    engine, state = built(stage, precision)
    saved = store.newest_whole()
    assert saved is not None
    assert BUFFER in saved.manifest["state_digests"]
    store.restore(saved, state)
    assert torch.equal(engine.module.mean, third)


def test_only_buffers_that_cannot_be_computed_anew_are_kept() -> None:
    assert list(kept_buffers(Counted())) == ["mean"]
    with pytest.raises(TypeError, match=r"buffer mean: got torch\.bfloat16, expected torch\.float32"):
        kept_buffers(Counted().bfloat16())
