"""What ranks on processors exchange in a step, through gloo, without the copies that DeepSpeed and PyTorch make.

Gradients are summed where they lie and in the type in which they are kept; weights arrive where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

_EXCHANGE = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor"}


def is_left_to_us(settings: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's settings do not say how to exchange gradients."""
    return not _EXCHANGE & settings.keys()


def sum_in_place(engine: Any) -> None:
    """Average a bf16 engine's gradients over the ranks in the buffers that accumulate them.

    DeepSpeed would flatten all of them into one tensor, cast it, exchange it, cast it back and copy it apart.

    Args:
        engine: DeepSpeed's, around its ``BF16_Optimizer``.
    """

    def average(**_: Any) -> None:
        gradients, _experts = engine.optimizer.get_grads_for_reduction()
        for flat in gradients:
            dist.all_reduce(flat)
            flat.div_(dist.get_world_size())

    engine.buffered_allreduce_fallback = average


def gather_in_place(backend: Any) -> None:
    """Gather equal parts of a tensor by broadcasting each, which takes a fifth of the time of gloo's all-gather.

    Args:
        backend: DeepSpeed's; its function that gathers into one tensor is replaced.
    """
    usual = backend.all_gather_function

    def gather(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> dist.Work | None:
        if async_op:
            work: dist.Work = usual(output_tensor, input_tensor, group=group, async_op=True)
            return work
        parts = output_tensor.view(dist.get_world_size(group), *input_tensor.shape)
        own = parts[dist.get_rank(group)]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        sent = [
            dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)
        ]
        for work in sent:
            work.wait()
        return None

    backend.all_gather_function = gather
