"""What a forward pass of any network takes, found by running it on the meta device, where nothing is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of matrix products and convolutions.

    Args:
        model: on the meta device, as ``inputs`` are.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes that autograd keeps for the backward pass, parameters not counted.

    Args:
        model: on the meta device, as ``inputs`` are.
    """
    own = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # whole, so that no other tensor takes an id

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
