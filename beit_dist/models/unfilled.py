"""Models whose first values are set anyway: PyTorch's own, which take seconds to draw, are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def unfilled(build: Callable[[], ModelT]) -> ModelT:
    """What ``build`` returns, on the CPU, with whatever was in its memory as parameters and buffers."""
    with torch.device("meta"):
        model = build()
    # As Module.to_empty does, but its empty_like of a meta tensor imports SymPy, which takes up to a second.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))  # type: ignore[no-untyped-call]
    return model
