"""Attention on the CPU, both ways, is the formula: in values and gradients, whatever is worked on at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beit_dist.models import attention_on_cpu
from beit_dist.models.attention import attend, spelt_out

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02}


@pytest.fixture(params=[1, 2, 3, 8], ids=lambda samples: f"{samples} at a time")
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many of 7 samples with 3 heads and 17 tokens are worked on at a time."""
    samples: int = request.param
    return samples


@pytest.mark.parametrize("way", [attend, spelt_out])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, biased: bool, way: object, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_on_cpu, "_LOGITS_AT_A_TIME", at_a_time * 3 * 17 * 17 * dtype.itemsize)
    given = _inputs(dtype, biased)
    ours = _run(attend if way is attend else spelt_out, *given)
    theirs = _run(_formula, *[None if one is None else one.double() for one in given])
    for name, mine, right in zip(("mixed", "qkv", "bias"), ours, theirs, strict=True):
        if right is None:
            assert mine is None
            continue
        assert mine is not None
        assert mine.dtype is dtype
        error = (mine.double() - right).norm() / right.norm()
        assert error < TOLERANCES[dtype], name


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    qkv, bias, arriving = _inputs(torch.float32, True)
    assert bias is not None
    with torch.no_grad():
        alone = attend(qkv, bias)
    frozen = qkv.clone()
    bias.requires_grad_()
    mixed = attend(frozen, bias)
    mixed.backward(arriving)
    assert torch.equal(mixed, alone)
    assert frozen.grad is None
    assert bias.grad is not None


def test_the_gradient_of_a_bias_is_summed_in_fp32() -> None:
    """600 samples alike: bf16 would stop counting at 256."""
    one = torch.ones(1, 2, 3, 1, 16, dtype=torch.bfloat16)
    one[0, 1] = 2
    qkv, bias = one.expand(600, -1, -1, -1, -1).contiguous(), torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    sums = []
    for samples in (1, 600):
        bias.requires_grad_().grad = None
        attend(qkv[:samples], bias).sum().backward()
        assert bias.grad is not None
        sums.append(bias.grad.double())
    torch.testing.assert_close(sums[1], 600 * sums[0], rtol=0.01, atol=1e-6)


def _inputs(dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(7, 17, 3, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(1, 3, 17, 17, generator=generator, dtype=torch.float64).to(dtype) if biased else None
    return qkv, bias, torch.randn(7, 17, 24, generator=generator, dtype=torch.float64).to(dtype)


def _run(way: object, qkv: Tensor, bias: Tensor | None, arriving: Tensor) -> tuple[Tensor | None, ...]:
    assert callable(way)
    leaves = [None if one is None else one.detach().clone().requires_grad_() for one in (qkv, bias)]
    mixed = way(*leaves)
    mixed.backward(arriving)
    return mixed.detach(), *(None if one is None else one.grad for one in leaves)


def _formula(qkv: Tensor, bias: Tensor | None) -> Tensor:
    query, key, value = qkv.unbind(2)
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value).flatten(2)
