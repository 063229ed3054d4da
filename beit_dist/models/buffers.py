"""What a model keeps besides its parameters: BatchNorm's running statistics, nothing that can be computed anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's persistent buffers by name, as they are.

    Raises:
        TypeError: one is not of fp32, as all that a checkpoint holds.
    """
    found = {}
    for _, _, path, buffer in _persistent(model):
        found[path] = buffer
        if buffer.dtype != torch.float32:
            raise TypeError(f"buffer {path}: got {buffer.dtype}, expected torch.float32")
    return found


def keep_in_fp32(model: nn.Module) -> None:
    """Undo what casting a model to bf16 or fp16 does to its persistent buffers; the values are rounded already."""
    for module, name, _, buffer in list(_persistent(model)):
        module._buffers[name] = buffer.float()


def _persistent(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield module, name, f"{prefix}.{name}" if prefix else name, buffer
