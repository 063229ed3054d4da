"""The first value of every parameter: drawn by seed and name, so the same on every rank and in any order."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from beit_dist.config.model import BackboneConfig

INIT_STD = 0.02
"""Deviation of the normal distribution that weights are drawn from (unilm)."""
_THREADS = 4
"""At most, as there may be eight ranks on a host."""

Draw = Callable[[str, Sequence[int]], Tensor]
"""The first value of a parameter, by its name and shape."""


def fill(module: nn.Module, draw: Draw) -> None:
    """Give every parameter its first value. No draw depends on another, so several threads draw at once."""

    def set_one(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        with torch.no_grad():  # holds for one thread only
            parameter.copy_(draw(name, parameter.shape))

    with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(set_one, module.named_parameters()))


def pretraining_value(name: str, shape: Sequence[int], config: BackboneConfig, seed: int) -> Tensor:
    """A parameter's value before pre-training: fp32 on the CPU (unilm ``modeling_pretrain.py``).

    Weights are drawn from a normal distribution truncated at ± one deviation. The two matrices that end the
    residual branches of block l = 1, 2, ... are then divided by sqrt(2 · l).
    """
    known = _not_drawn(name, shape, config)
    return _rescaled(name, _truncated_normal(shape, generator_of(seed, name))) if known is None else known


def finetuning_value(name: str, shape: Sequence[int], config: BackboneConfig, seed: int) -> Tensor:
    """A backbone parameter's value before fine-tuning: fp32 on the CPU (unilm ``modeling_finetune.py``).

    There the normal distribution is truncated at ± 2, a hundred deviations, so not at all; and the patch
    embedding, a convolution, starts as PyTorch's do. Blocks are rescaled as before pre-training.
    """
    if name.startswith("patch_embed.proj."):
        return convolution_default(shape, config.patch_bytes, generator_of(seed, name))
    known = _not_drawn(name, shape, config)
    return _rescaled(name, normal(shape, INIT_STD, generator_of(seed, name))) if known is None else known


def normal(shape: Sequence[int], deviation: float, generator: torch.Generator) -> Tensor:
    """Normal around 0."""
    return torch.empty(tuple(shape), device="cpu").normal_(0, deviation, generator=generator)


def convolution_default(shape: Sequence[int], fan_in: int, generator: torch.Generator) -> Tensor:
    """Weight or bias of a convolution as PyTorch starts it: uniform within ± 1 / sqrt(fan_in)."""
    edge = 1 / math.sqrt(fan_in)
    return torch.empty(tuple(shape), device="cpu").uniform_(-edge, edge, generator=generator)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each parameter: a draw depends on no other parameter's size or order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))


def _not_drawn(name: str, shape: Sequence[int], config: BackboneConfig) -> Tensor | None:
    """The value of a parameter that starts with the same number everywhere."""
    kind = name.rsplit(".", 1)[-1]
    if kind in ("bias", "q_bias", "v_bias", "relative_position_bias_table"):
        return torch.zeros(tuple(shape))
    if kind in ("gamma_1", "gamma_2"):
        return torch.full(tuple(shape), config.layer_scale)
    if re.search(r"(^|[._])norm\d*\.", name):
        return torch.ones(tuple(shape))
    return None


def _rescaled(name: str, value: Tensor) -> Tensor:
    """The value, smaller the deeper its block if it ends a residual branch."""
    residual = re.fullmatch(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight", name)
    return value / math.sqrt(2 * (int(residual[1]) + 1)) if residual else value


def _truncated_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal with deviation ``INIT_STD`` within ± one deviation, by the inverse of its distribution.

    ``nn.init.trunc_normal_`` rejects and redraws whole tensors: ten times the work at this narrow truncation.
    """
    edge = math.erf(1 / math.sqrt(2))
    uniform = torch.empty(tuple(shape), device="cpu").uniform_(-edge, edge, generator=generator)
    return uniform.erfinv_().mul_(INIT_STD * math.sqrt(2)).clamp_(-INIT_STD, INIT_STD)
