"""Where DeepSpeed does not guard the update, ours does."""

from __future__ import annotations

import pytest
import torch

from beit_dist.config import OptimizerConfig
from beit_dist.engine.optimizer import GuardedAdamW, build_optimizer


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 3)]


def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"name": "decay", "params": parameters[:1], "weight_decay": 0.1},
        {"name": "no_decay", "params": parameters[1:], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    mine = parameters()
    optimizer = build_optimizer(groups(mine), OptimizerConfig(clip_grad=1.0), guarded=True, fused=True)
    assert isinstance(optimizer, GuardedAdamW)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = [p.detach().clone() for p in mine]
    for p in mine:
        p.grad = torch.ones_like(p)
    mine[0].grad[2] = poison
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
    assert not any(optimizer.state.values())

    mine[0].grad[2] = 1.0
    optimizer.step()
    assert not optimizer.overflow
    assert not torch.equal(mine[0], before[0])


def test_clipping_scales_by_the_norm_over_all_groups() -> None:
    clipped, plain = parameters(), parameters()
    ours = build_optimizer(groups(clipped), OptimizerConfig(clip_grad=0.5), guarded=True, fused=True)
    reference = torch.optim.AdamW(groups(plain), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for optimizer in (ours, reference):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
    for ps in (clipped, plain):
        for p in ps:
            p.grad = torch.full_like(p, 2.0)
    norm = torch.nn.utils.clip_grad_norm_(plain, 0.5)
    ours.step()
    reference.step()
    assert float(ours._global_grad_norm) == pytest.approx(float(norm))
    for a, b in zip(clipped, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_the_rate_is_zero_until_the_schedule_sets_it() -> None:
    optimizer = build_optimizer(groups(parameters()), OptimizerConfig(), guarded=False, fused=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
