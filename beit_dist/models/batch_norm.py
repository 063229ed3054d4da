"""Batch normalisation over the images of all ranks, on any device (torch's ``SyncBatchNorm`` needs CUDA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPS = 1e-5
"""Added to variances (PyTorch's)."""
MOMENTUM = 0.1
"""Share of a micro-batch in the running statistics (PyTorch's)."""


class BatchNorm(nn.Module):
    """Normalises each channel by its mean and variance: in training the micro-batch's, else the running ones.

    Statistics are fp32 whatever the model is cast to, and the running ones are saved with the model.

    Args:
        channels: C.
        group: ranks that normalise by what they have in common; each must give as many images of the same size.
            None: this rank alone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def reset_statistics(self) -> None:
        """Forget what was seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) to the same.

        Raises:
            ValueError: in training, there is one value a channel over all ranks, which has no variance.
        """
        values = x.float()
        mean, variance = self._statistics(values) if self.training else (self.running_mean, self.running_var)
        scale = self.weight.float() * (variance + EPS).rsqrt()
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), values, scale.view(-1, 1, 1)).to(x.dtype)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) of the micro-batch over all ranks, of which the running ones take in a share."""
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        count = ranks * values.numel() // values.shape[1]
        if count == 1:
            raise ValueError("batch normalisation needs two images over all ranks: raise micro_batch")
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        if self.group is not None and ranks > 1:
            # In fp64, in which the square of a mean that is large beside the deviation can be taken off again.
            moments = torch.stack((mean.double(), variance.double() + mean.double() ** 2))
            mean64, square = (sum_over_ranks(moments, self.group) / ranks).unbind()
            mean, variance = mean64.float(), (square - mean64**2).float()
        with torch.no_grad():
            for running, now in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
                mixed = running.lerp(now, MOMENTUM)
                # A step that overflows is skipped, and must not spoil these for good.
                running.copy_(torch.where(mixed.isfinite(), mixed, running))
        return mean, variance

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        """Move or cast the module, but leave statistics in fp32: a tenth of bf16's precision would be left out."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                self.register_buffer(name, before[name].to(buffer.device))
        return self


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the ranks, to be differentiated: a gradient is summed over them too. Collective."""
    summed: Tensor = _SumOverRanks.apply(tensor, group)  # type: ignore[no-untyped-call]
    return summed


class _SumOverRanks(torch.autograd.Function):
    """A rank's value is in every rank's sum, so that its gradient is that of all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
