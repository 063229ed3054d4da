"""Attention of one layer: our kernel beside what PyTorch has, on a GPU; on a CPU, what the model uses there.

Every contender takes queries, keys and values as the projection leaves them and gives what the next one reads, so
copies between layouts count. Backward gives the gradients of all three and of the bias.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.config.model import BackboneConfig
from beit_dist.models.attention import attend, spelt_out
from beit_dist.models.kernels.tiles import Tile, Tiles, tiles_in_place, tiles_of

Contender = Callable[[Tensor, Tensor], Tensor]
"""(B, N, 3, H, D) and a bias (1, H, N, N), to (B, N, C)."""

CALLS = 20
"""Of a contender between two looks at the clock on a GPU, so that its start is no part of the time."""
_NARROW = tiles_of(64, 2)
TILES: Mapping[str, Tiles] = {
    "ours, rows of 64": Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    "ours, rows of 64, 32 across": Tiles(
        Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3), Tile(64, 32, 4, 3)
    ),
    "ours, 64 across": replace(_NARROW, forward=Tile(128, 64, 8, 2), queries=Tile(128, 64, 8, 2)),
    "ours, keys 64 at once": replace(_NARROW, keys=Tile(64, 128, 8, 2)),
    "ours, three stages": Tiles(
        Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)
    ),
    "ours, bias 32 across": replace(_NARROW, bias=Tile(128, 32, 8, 2)),
}
"""Other ways to cut the kernel's work, for heads of 64 values."""


def measure(quick: bool) -> Iterator[Row]:
    """Milliseconds of one layer: forward, and forward and backward, of base and large."""
    if torch.cuda.is_available():
        cases = [("base", 256)] if quick else [("base", 256), ("large", 128)]
        for case in cases:
            yield from _on_gpu(*case, quick)
        return
    _say("not measured here: the kernel, FlexAttention and flash attention, which run on a GPU")
    yield from _rows("tiny", 8, {"ours": attend, "spelt out": spelt_out}, 3 if quick else 7)


def _on_gpu(size: str, batch: int, quick: bool) -> Iterator[Row]:
    contenders: dict[str, Contender] = {"sdpa": attend, "sdpa, no bias": _without_bias, "flex": _flex()}
    if importlib.util.find_spec("triton") is None:
        _say("not measured here: the kernel, since Triton is not installed")
    else:
        from beit_dist.models.kernels.attention import fused_attention

        contenders = {"ours": fused_attention, **contenders}
        contenders |= {} if quick else dict.fromkeys(TILES, fused_attention)
    return _rows(size, batch, contenders, 3 if quick else 7)


def _rows(size: str, batch: int, contenders: Mapping[str, Contender], repetitions: int) -> Iterator[Row]:
    """Both directions of every contender, in turn; one that fails is left out, and why is said."""
    gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    qkv, bias, grad = inputs(BackboneConfig.model_validate({"size": size}), batch, dtype, device)
    calls = CALLS if gpu else 1

    def repeated(direction: Callable[[Contender], object], who: str) -> Callable[[], None]:
        def work() -> None:
            with tiles_in_place(TILES[who]) if who in TILES else nullcontext():
                for _ in range(calls):
                    direction(contenders[who])
                if gpu:
                    torch.cuda.synchronize()

        return work

    def forward(function: Contender) -> object:
        with torch.no_grad():
            return function(qkv, bias)

    def both(function: Contender) -> object:
        return torch.autograd.grad(function(qkv, bias), (qkv, bias), grad, allow_unused=True)

    name_of_type = str(dtype).removeprefix("torch.")
    for name, direction in (("forward", forward), ("both", both)):
        works = {}
        for who in contenders:
            work = repeated(direction, who)
            try:
                work()
            except Exception as error:  # a contender of another version, or a device that lacks it
                _say(f"left out: {who}, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            works[who] = work
        case = f"{size}, batch {batch}, {name_of_type}, {name}"
        taken = in_turn(works, repetitions)
        for who in works:
            yield row("attention", case, who, [1e3 * t / calls for t in taken[who]], "ms")


def inputs(
    config: BackboneConfig, batch: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random qkv and bias, both to be differentiated, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    length, heads = 1 + config.patches, config.heads
    shapes = (
        (batch, length, 3, heads, config.width // heads),
        (heads, length, length),
        (batch, length, config.width),
    )
    qkv, bias, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    aligned = F.pad(bias, (0, -length % 16))[None, ..., :length]  # as the model lays it out
    return qkv.requires_grad_(), aligned.requires_grad_(), grad


def _without_bias(qkv: Tensor, bias: Tensor) -> Tensor:
    return attend(qkv, None)


def _flex() -> Contender:
    from torch.nn.attention.flex_attention import flex_attention

    def mixed(qkv: Tensor, bias: Tensor) -> Tensor:
        def score(logit: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return logit + bias[0, head, query, key]

        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        found = flex_attention(query, key, value, score_mod=score)
        assert isinstance(found, Tensor)
        return found.transpose(1, 2).flatten(2)

    return torch.compile(mixed, dynamic=False)


def _say(what: str) -> None:
    print(f"attention: {what}", file=sys.stderr, flush=True)
