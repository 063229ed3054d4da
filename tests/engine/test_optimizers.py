"""Every optimizer: its updates, what it keeps, where it works; and nothing that is not finite updates anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit_dist.config.model import ModelConfig
from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.engine.optimizers.guarding import guard_updates
from beit_dist.engine.optimizers.table import (
    OPTIMIZERS,
    build_optimizer,
    check_model,
    ignored_settings,
    kept_values,
    kind_of,
)
from beit_dist.engine.resolve import read_ds_config, resolve
from beit_dist.errors import ConfigError
from beit_dist.models.mim import MaskedImageModel

DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"
SHAPES = {"blocks.0.mlp.fc1.weight": (5, 3), "lm_head.weight": (4, 3), "norm.bias": (3,)}
BF16 = {"bf16": {"enabled": True}}


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def groups(named: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    *decay, (last, bias) = named.items()
    return [
        {"name": "decay", "params": decay, "weight_decay": 0.1},
        {"name": "no_decay", "params": [(last, bias)], "weight_decay": 0.0},
    ]


def built(name: str, named: dict[str, torch.nn.Parameter], **settings: Any) -> Any:
    return build_optimizer(groups(named), OptimizerConfig(name=name, **settings))


def sgd(named: dict[str, torch.nn.Parameter]) -> Any:
    return torch.optim.SGD(groups(named), lr=0.0, momentum=0.9)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """As the schedule does."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def give_gradients(named: dict[str, torch.nn.Parameter], step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def recipe(*overrides: str) -> PretrainingConfig:
    return load_recipe(PretrainingConfig, None, ["run=r", "global_batch=96", "micro_batch=32", *overrides])


@pytest.mark.parametrize("name", [*OPTIMIZERS, "another"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, poison: float) -> None:
    mine = parameters()
    optimizer = sgd(mine) if name == "another" else built(name, mine)
    guard_updates(optimizer, 1.0)
    set_rate(optimizer, 0.1)
    before = {key: parameter.detach().clone() for key, parameter in mine.items()}
    give_gradients(mine)
    first = mine["norm.bias"].grad
    assert first is not None
    first[2] = poison
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(parameter, before[key]) for key, parameter in mine.items())
    assert not any(optimizer.state.values())

    first[2] = 1.0
    optimizer.step()
    assert not optimizer.overflow
    assert not any(torch.equal(parameter, before[key]) for key, parameter in mine.items())


def test_clipping_scales_by_the_norm_over_all_groups() -> None:
    clipped, plain = parameters(), parameters()
    ours = built("adamw", clipped)
    guard_updates(ours, 0.5)
    reference = torch.optim.AdamW(groups(plain), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for optimizer, named in ((ours, clipped), (reference, plain)):
        set_rate(optimizer, 0.01)
        give_gradients(named)
    norm = torch.nn.utils.clip_grad_norm_(plain.values(), 0.5)
    ours.step()
    reference.step()
    assert float(ours._global_grad_norm) == pytest.approx(float(norm))
    for name, parameter in clipped.items():
        torch.testing.assert_close(parameter, plain[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_is_zero_until_the_schedule_sets_it_for_every_parameter(name: str) -> None:
    mine = parameters()
    optimizer = built(name, mine)
    before = {key: parameter.detach().clone() for key, parameter in mine.items()}
    give_gradients(mine)
    optimizer.step()
    assert all(torch.equal(parameter, before[key]) for key, parameter in mine.items())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(mine)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_table_says_is_kept_is_what_a_step_leaves(name: str) -> None:
    mine = parameters()
    optimizer = built(name, mine)
    give_gradients(mine)
    set_rate(optimizer, 0.1)
    optimizer.step()
    kind = kind_of(optimizer)
    assert kind is OPTIMIZERS[name]
    for key, parameter in mine.items():
        kept, state = kind.kept(key, parameter.shape), optimizer.state[parameter]
        assert set(state) == {*kept.roles, *(["step"] if kept.counts else [])}
        assert all(state[role].shape == parameter.shape for role in kept.roles)
    values = [value for state in optimizer.state.values() for role, value in state.items() if role != "step"]
    assert sum(value.numel() for value in values) == sum(kept_values(name, SHAPES).values())


def test_lion_is_algorithm_2_of_its_paper() -> None:
    """arXiv 2302.06675."""
    mine, lr, (beta1, beta2) = parameters(), 0.03, (0.9, 0.99)
    optimizer = built("lion", mine, betas=[beta1, beta2])
    set_rate(optimizer, lr)
    theta = {name: parameter.detach().double().numpy().copy() for name, parameter in mine.items()}
    momentum = {name: np.zeros_like(values) for name, values in theta.items()}
    for step in range(4):
        give_gradients(mine, step)
        optimizer.step()
        for name, parameter in mine.items():
            assert parameter.grad is not None
            gradient = parameter.grad.double().numpy()
            decay = 0.0 if name == "norm.bias" else 0.1
            update = beta1 * momentum[name] + (1 - beta1) * gradient
            theta[name] = theta[name] - lr * (np.sign(update) + decay * theta[name])
            momentum[name] = beta2 * momentum[name] + (1 - beta2) * gradient
            np.testing.assert_allclose(parameter.detach().numpy(), theta[name], atol=1e-6)
            np.testing.assert_allclose(optimizer.state[parameter]["exp_avg"].numpy(), momentum[name], atol=1e-6)


def test_muon_makes_the_blocks_matrices_orthogonal_steps_and_adamw_does_the_rest() -> None:
    mine, plain = parameters(), parameters()
    muon, adamw = built("muon", mine), built("adamw", plain)
    before = {name: parameter.detach().clone() for name, parameter in mine.items()}
    for optimizer, named in ((muon, mine), (adamw, plain)):
        set_rate(optimizer, 0.01)
        give_gradients(named)
        optimizer.step()
    hidden = "blocks.0.mlp.fc1.weight"
    assert all(torch.equal(mine[name], plain[name]) for name in SHAPES if name != hidden)
    step = (before[hidden] * (1 - 0.01 * 0.1) - mine[hidden].detach()) / 0.01
    sizes = torch.linalg.svdvals(step) / (0.2 * max(SHAPES[hidden]) ** 0.5)  # as large as AdamW's usually are
    assert sizes == pytest.approx(torch.ones(3), abs=0.4)  # Newton-Schulz stops between 0.7 and 1.2 or so


def test_muons_matrices_are_those_of_the_blocks() -> None:
    with torch.device("meta"):
        model = MaskedImageModel(ModelConfig(size="base", depth=2, absolute_positions=True))
    optimizer = build_optimizer(model.parameter_groups(0.05), OptimizerConfig(name="muon"))
    roles = kind_of(optimizer).kept
    matrices = {name for name, p in model.named_parameters() if "momentum_buffer" in roles(name, p.shape).roles}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert matrices == {f"blocks.{block}.{part}.weight" for block in (0, 1) for part in parts}
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("decay, hidden matrices", 0.05),
        ("decay", 0.05),
        ("no_decay", 0.0),
    ]


def test_muon_is_refused_for_a_model_without_matrices_in_blocks() -> None:
    named = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (("w", (2, 2, 3, 3)), ("b", (2,)))}
    with pytest.raises(ConfigError, match=r"optimizer\.name: got 'muon', .* no matrices"):
        check_model(OptimizerConfig(name="muon"), {name: p.shape for name, p in named.items()})


@pytest.mark.parametrize(
    ("overrides", "ds_config", "said"),
    [
        (["optimizer.name=lyon"], {}, "got 'lyon', expected adamw, lion"),
        (["optimizer.name=AdamW"], {}, "Did you mean adamw?"),
        (["optimizer.name=lyon"], {}, "Did you mean lion?"),
        *((["optimizer.name=muon"], {"zero_optimization": {"stage": n}}, "--ds_config zero0") for n in (1, 2, 3)),
        (["optimizer.name=muon"], BF16, "ZeRO stage 0 in bf16"),
        (["optimizer.name=muon", "precision=fp16"], {}, "ZeRO stage 0 in fp16"),
    ],
)
def test_what_does_not_exist_or_work_is_refused_before_anything_is_built(
    overrides: list[str], ds_config: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe(*overrides), ds_config, 2)
    assert said in str(caught.value)


def test_muon_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(recipe("optimizer.name=muon"), read_ds_config(DEEPSPEED / "zero0.json"), 2).precision == "fp32"
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"got 'muon', expected torch 2\.9 or newer"):
        resolve(recipe("optimizer.name=muon"), {}, 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_told_what_it_must_be_by_us(stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage}}
    assert resolve(recipe("optimizer.name=lion"), zero, 2).deepspeed["zero_allow_untested_optimizer"] is True


def test_settings_that_an_optimizer_does_not_use_are_told_if_a_recipe_gives_them() -> None:
    everything = OptimizerConfig().model_dump()
    ignored = {"adamw": ["muon"], "lion": ["eps", "muon"], "muon": []}
    for name, expected in ignored.items():
        assert ignored_settings(OptimizerConfig(**{**everything, "name": name})) == expected
        assert ignored_settings(OptimizerConfig(name=name)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_of_the_section_is_used_by_the_optimizer_or_told(name: str) -> None:
    """A change of a setting that is not told as ignored changes an update."""

    def update(**settings: Any) -> list[torch.Tensor]:
        mine = parameters()
        optimizer = built(name, mine, **settings)
        set_rate(optimizer, 0.1)
        for step in range(3):
            give_gradients(mine, step)
            optimizer.step()
        return [parameter.detach() for parameter in mine.values()]

    for setting, value in {"betas": (0.5, 0.6), "eps": 1.0, "muon": {"momentum": 0.5}}.items():
        told = ignored_settings(OptimizerConfig(name=name, **{setting: value})) == [setting]
        same = all(torch.equal(a, b) for a, b in zip(update(), update(**{setting: value}), strict=True))
        assert same is told, setting
