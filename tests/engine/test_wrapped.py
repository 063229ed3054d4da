"""DeepSpeed's engine as this system sets it up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.optimizers.table import build_optimizer
from beit_dist.engine.resolve import resolve
from beit_dist.engine.wrapped import initialize_engine

pytestmark = pytest.mark.slow


def test_gradients_of_one_rank_are_summed_in_fp32_and_sent_to_nobody(
    joined: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 and 2⁻⁹ are bf16, their sum is not: an exchange in bf16 would round it to 1."""
    config = PretrainingConfig(run="run", global_batch=2, micro_batch=1)
    layer = nn.Linear(1, 1, bias=False)
    groups = [{"name": "all", "params": list(layer.named_parameters()), "weight_decay": 0.0}]
    settings = {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    engine = initialize_engine(layer, build_optimizer(groups, OptimizerConfig()), resolve(config, settings, 1))
    sent = []
    monkeypatch.setattr(engine, "buffered_allreduce_fallback", lambda **given: sent.append(given))
    seen = []
    monkeypatch.setattr(
        engine.optimizer.optimizer,
        "step",
        lambda: seen.append(float(engine.optimizer.fp32_groups_flat_partition[0].grad[0])),
    )
    for value in (1.0, 2.0**-9):
        engine.backward(engine(torch.full((1, 1), value, dtype=torch.bfloat16)).sum(), scale_wrt_gas=False)
        engine.step()
    assert seen == [1 + 2.0**-9]
    assert not sent
