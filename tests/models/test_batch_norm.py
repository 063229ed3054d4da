"""Batch normalisation: PyTorch's on one rank, and the same over several as over their images together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit_dist.models import batch_norm
from beit_dist.models.batch_norm import BatchNorm

CHANNELS = 5


def images(count: int = 4, seed: int = 0) -> Tensor:
    """Maps whose channels' means are large beside their deviations."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, CHANNELS, 3, 2, generator=generator)
    return drawn * torch.arange(1.0, 1 + CHANNELS).view(-1, 1, 1) + torch.tensor([0, 3, -40, 8, 100]).view(
        -1, 1, 1
    )


def ours(group: Any = None) -> BatchNorm:
    """One whose every value matters."""
    norm = BatchNorm(CHANNELS, group)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return norm


def torchs() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    norm.load_state_dict(ours().state_dict(), strict=False)
    return norm


def trained(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics of a step whose loss weighs each value differently."""
    x = x.clone().requires_grad_()
    y = norm(x)
    # Weights by the position in an image only, times the values: each rank can compute its own part of the loss.
    (y.square() * torch.linspace(0, 1, y[0].numel()).view_as(y[0])).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | {"mean": norm.running_mean, "var": norm.running_var}  # type: ignore[return-value]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_one_rank_normalises_as_pytorch_does_in_training_and_in_evaluation() -> None:
    norm, peer = ours(), torchs()
    assert_close(trained(norm, images()), trained(peer, images()))
    other = images(seed=1)
    norm.eval(), peer.eval()
    torch.testing.assert_close(norm(other), peer(other), rtol=1e-4, atol=1e-4)


def test_ranks_normalise_as_one_rank_with_all_their_images(tmp_path: Path) -> None:
    world, together = 2, images()
    expected = trained(torchs(), together)
    found = on_ranks(tmp_path, world, lambda rank, group: trained(ours(group), together[2 * rank : 2 * rank + 2]))
    for name in ("mean", "var"):
        assert all(torch.equal(one[name], found[0][name]) for one in found)
        torch.testing.assert_close(found[0][name], expected[name], rtol=1e-5, atol=1e-5)
    parts = {name: torch.cat([one[name] for one in found]) for name in ("y", "x")}
    summed = {name: found[0][name] + found[1][name] for name in ("weight", "bias")}
    assert_close(parts | summed, {name: expected[name] for name in ("y", "x", "weight", "bias")})


def on_ranks(
    folder: Path, world: int, work: Callable[[int, dist.ProcessGroup], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """What each rank gets, in threads of this process: gloo's groups need no default group."""
    found: list[dict[str, Tensor]] = [{} for _ in range(world)]
    failed: queue.Queue[BaseException] = queue.Queue()

    def one(rank: int) -> None:
        try:
            store = dist.FileStore(str(folder / "store"), world)
            found[rank] = work(rank, Group(store, rank, world))  # type: ignore[arg-type]
        except BaseException as error:
            failed.put(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_norm.dist, "all_reduce", lambda tensor, group: group.sum(tensor))
        patch.setattr(batch_norm.dist, "get_world_size", lambda group: group.world)
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if not failed.empty():
        raise failed.get()
    return found


class Group:
    """A rank's end of a gloo group."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.world = world
        self._gloo = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=60))

    def sum(self, tensor: Tensor) -> None:
        """In place, over all ranks."""
        self._gloo.allreduce([tensor]).wait()


def test_statistics_stay_in_fp32_when_the_model_is_cast() -> None:
    norm = ours()
    trained(norm, images())
    before = norm.running_mean.clone()
    cast = nn.Sequential(norm).bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, before)
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    x = images().bfloat16()
    assert cast(x).dtype == torch.bfloat16
    exact = ours()(x.float())
    assert (cast.train()(x).float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_step_that_overflows_does_not_spoil_the_running_statistics() -> None:
    norm, x = ours(), images()
    x[0, 1, 0, 0] = torch.inf
    norm(x)
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert norm.running_mean[1] == 0
    assert norm.running_mean[2] != 0


def test_one_value_a_channel_is_refused_in_training_only() -> None:
    norm, x = ours(), torch.ones(1, CHANNELS, 1, 1)
    with pytest.raises(ValueError, match=r"two images over all ranks: raise micro_batch"):
        norm(x)
    norm.eval()(x)
