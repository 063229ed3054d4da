"""The cross-entropy that is found in chunks, its gradient and its counts, against fp64 and plain operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.models.heads import cross_entropy
from beit_dist.models.heads.cross_entropy import cross_entropy_and_ranks, in_operations

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(params=[1, 4, 100], ids=lambda rows: f"{rows} rows at a time")
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 11 rows and 64 classes."""
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", request.param * 64 * 4)


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_gradient_and_counts(dtype: torch.dtype) -> None:
    logits, targets = _inputs(dtype)
    loss, correct, among = cross_entropy_and_ranks(logits.requires_grad_(), targets, 5)
    (7 * loss).backward()  # as a loss scale or a mean multiplies it
    exact = logits.detach().double().requires_grad_()
    right = F.cross_entropy(exact, targets, ignore_index=-100, reduction="sum")
    (7 * right).backward()
    assert loss.dtype is torch.float32
    assert float(loss.detach()) == pytest.approx(float(right.detach()), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.dtype is dtype
    assert exact.grad is not None
    assert (logits.grad.double() - exact.grad).norm() / exact.grad.norm() < TOLERANCES[dtype]
    ranks = (exact > exact.gather(1, targets.clamp(min=0).unsqueeze(1))).sum(1)
    assert int(correct) == int(((ranks == 0) & (targets >= 0)).sum()) == 2
    assert int(among) == int(((ranks < 5) & (targets >= 0)).sum()) == 4


@pytest.mark.usefixtures("rows_at_a_time")
def test_plain_operations_for_the_compiler_say_the_same() -> None:
    logits, targets = _inputs(torch.float32)
    both = []
    for way in (cross_entropy_and_ranks, in_operations):
        leaf = logits.clone().requires_grad_()
        loss, *counts = way(leaf, targets, 5)
        loss.backward()
        both.append((loss.detach(), leaf.grad, *counts))
    for mine, plain in zip(*both, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7)


def test_small_likelihoods_of_fp16_are_not_lost() -> None:
    """Of a vocabulary of 65,536 each token is likely by 1.5e-5, which fp16 has to three bits only."""
    logits = torch.zeros(2, 65_536, dtype=torch.float16, requires_grad=True)
    loss, _, _ = cross_entropy_and_ranks(logits, torch.tensor([0, 1]), 5)
    (loss * 1000).backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 5]) == pytest.approx(1000 / 65_536, rel=1e-3)


@pytest.mark.parametrize("target", [7, 8])
def test_a_logit_that_is_no_number_makes_the_loss_none_and_counts_for_nothing(target: int) -> None:
    logits = torch.zeros(3, 64)
    logits[1, 7] = torch.nan
    loss, correct, among = cross_entropy_and_ranks(logits, torch.tensor([0, target, -100]), 64)
    assert loss.isnan()
    assert (int(correct), int(among)) == (1, 1)


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = _inputs(torch.float32)
    expected = cross_entropy_and_ranks(logits.clone().requires_grad_(), targets, 5)
    monkeypatch.setattr(torch, "empty_like", None)
    for mine, right in zip(cross_entropy_and_ranks(logits, targets, 5), expected, strict=True):
        assert torch.equal(mine, right)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """11 rows: of two the target is the likeliest, of two more among the five, and two are padding."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(11, 64, generator=generator)).to(dtype)
    order = logits.float().sort(dim=1, descending=True).indices
    targets = torch.tensor([order[row, rank] for row, rank in enumerate([0, 0, 2, 4, 5, 9, 63, 40, 20, 0, 0])])
    targets[-2:] = -100
    return logits, targets
