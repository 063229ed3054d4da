"""Where DeepSpeed does not guard the update, ours does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit_dist.config import ModelConfig, OptimizerConfig
from beit_dist.engine.optimizer import build_optimizer, guard_updates, layer_of, layer_scales
from beit_dist.models.mim import MaskedImageModel


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 3)]


def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"name": "decay", "params": parameters[:1], "weight_decay": 0.1},
        {"name": "no_decay", "params": parameters[1:], "weight_decay": 0.0},
    ]


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(groups(parameters), OptimizerConfig(), fused=True)


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups(parameters), lr=0.0, momentum=0.9)


@pytest.mark.parametrize("build", [adamw, sgd])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(build: Any, poison: float) -> None:
    mine = parameters()
    optimizer: Any = build(mine)
    guard_updates(optimizer, 1.0)
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
    ours: Any = adamw(clipped)
    guard_updates(ours, 0.5)
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
    optimizer = adamw(parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_layer_scales_have_the_originals_figures() -> None:
    base, large = layer_scales(12, 0.65), layer_scales(24, 0.75)
    assert (len(base), len(large)) == (14, 26)
    assert (base[0], base[1], base[12], base[13]) == pytest.approx((0.65**13, 0.65**12, 0.65, 1.0), rel=1e-12)
    assert (large[0], large[24], large[25]) == pytest.approx((7.525e-4, 0.75, 1.0), rel=1e-3)
    assert layer_scales(12, 1.0) == (1.0,) * 14


def test_every_parameter_is_in_the_originals_layer() -> None:
    with torch.device("meta"):
        model = MaskedImageModel(ModelConfig(size="base", absolute_positions=True))
    layers = {name: layer_of(name, 12) for name, _ in model.named_parameters()}
    first = {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name, layer in layers.items() if layer == 0} == first
    last = {f"{name}.{part}" for name in ("norm", "lm_head") for part in ("weight", "bias")}
    assert {name for name, layer in layers.items() if layer == 13} == {
        *last,
        "rel_pos_bias.relative_position_bias_table",
    }
    for block in range(12):
        names = {name for name, layer in layers.items() if layer == block + 1}
        assert names == {name for name in layers if name.startswith(f"blocks.{block}.")}
    assert (layer_of("head.weight", 12), layer_of("fc_norm.bias", 12)) == (13, 13)
