"""Which precision a run computes in: one given by name, or the one its devices are fast in (``precision: auto``).

A processor without bf16 units computes bf16 in software: with AVX2 alone a product takes 5 to 40 times as long
as in fp32. So ``auto`` measures for some milliseconds what the devices of this run really do.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.engine.resolve import AUTO, Resolved
from beit_dist.errors import ConfigError

WORTH_IT = 1.3
"""``auto`` takes bf16 or fp16 where its products run at this many times the speed of fp32's, at least."""

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions besides fp32, best first."""
_SMALL = (128, 256, 256)
"""Rows, inputs and outputs of a linear layer: enough to tell an emulation, which takes 1 to 20 ms for it."""
_LARGE = {"cpu": (512, 768, 768), "cuda": (2048, 2048, 2048)}
"""Enough to keep matrix units busy."""
EMULATED = 0.5
"""Where small products are slower than this share of fp32's, large ones would only take long."""
_TRIES = 5

Speeds = Mapping[str, float]
"""Speed of products in what a device computes in besides fp32, as a multiple of their speed in fp32."""


@dataclass(frozen=True)
class Decision:
    """A precision and why it was taken, in words."""

    precision: str
    why: str
    advice: str = ""
    """A warning, where another precision would be faster."""

    def __str__(self) -> str:
        return f"{self.precision} ({self.why})"


def speeds(device: torch.device, *wanted: str | None) -> dict[str, float]:
    """Measure what ``device`` makes of bf16, of fp16 where it is a GPU, and of what is ``wanted`` besides."""
    names = {"bf16", *wanted} if device.type == "cpu" else {"bf16", "fp16", *wanted}
    return {name: _speed(name, device) for name in LOW if name in names and supported(name)}


def check_precision(precision: str) -> None:
    """Refuse a precision that the device cannot compute in.

    Raises:
        ConfigError: it cannot; DeepSpeed would say so only after the ranks have joined.
    """
    from deepspeed.accelerator import get_accelerator

    if not supported(precision):
        device = get_accelerator().device_name()
        raise ConfigError("precision", precision, f"one that this {device} computes in", "Use fp32 or auto.")


def supported(precision: str) -> bool:
    """Whether DeepSpeed runs in this precision on the device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if precision == "fp16":
        return bool(accelerator.is_fp16_supported())
    return precision != "bf16" or bool(accelerator.is_bf16_supported())


def decide(
    asked: str,
    why: str,
    saved: str | None,
    agreement: Agreement,
    device: torch.device,
    excluded: Collection[str] = (),
) -> Decision:
    """The precision of this start, the same on every rank. Collective; rank 0 prints what is amiss.

    Args:
        asked: a precision by name, or ``auto``: that of the checkpoint, or in a new run bf16 or fp16 if every
            rank does it well, else fp32.
        why: where a name comes from.
        saved: the precision of the checkpoint that is continued; None in a new run.
        excluded: what ``auto`` may not stand for.
    """
    measured = {} if asked == "fp32" else speeds(device, asked, saved)
    decision = choose(asked, why, saved, agreement.gather((socket.gethostname(), measured)), excluded)
    if agreement.ranks.rank == 0:
        if saved not in (None, decision.precision):
            print(f"changed on resume: precision was {saved}, now {decision.precision}", flush=True)
        if decision.advice:
            print(f"warning: {decision.advice}", file=sys.stderr, flush=True)
    return decision


def settle(resolved: Resolved, saved: str | None, agreement: Agreement, device: torch.device) -> Resolved:
    """``resolved`` in the precision that :func:`decide` takes. Collective."""
    decision = decide(resolved.precision, resolved.why, saved, agreement, device, resolved.excluded)
    return resolved.settled(decision.precision, decision.why)


def decide_alone(asked: str, why: str, saved: str | None, excluded: Collection[str] = ()) -> Decision:
    """What :func:`decide` takes where all ranks' devices are like this machine's; advice is part of the reason."""
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().device_name())
    measured = {} if asked == "fp32" else speeds(device, asked, saved)
    decision = choose(asked, why, saved, [("", measured)], excluded)
    return replace(decision, why=f"{decision.why}; {decision.advice}") if decision.advice else decision


def settle_alone(resolved: Resolved, saved: str | None) -> Resolved:
    """``resolved`` in the precision that :func:`decide_alone` takes."""
    decision = decide_alone(resolved.precision, resolved.why, saved, resolved.excluded)
    return resolved.settled(decision.precision, decision.why)


def choose(
    asked: str,
    why: str,
    saved: str | None,
    found: Sequence[tuple[str, Speeds]],
    excluded: Collection[str] = (),
) -> Decision:
    """What :func:`decide` takes.

    Args:
        found: host and speeds of each rank, in the order of ranks.
    """
    best = _fastest(found, excluded)
    if asked == AUTO:
        if saved is None or saved in excluded or (saved in LOW and _slowest(saved, found) is None):
            return best
        asked, why = saved, "auto: as in the checkpoint"
        if saved == "fp32" != best.precision:
            fast = _slowest(best.precision, found)
            return Decision(saved, why, f"{best.precision} is {fast}: precision={best.precision} would be faster")
    slow = _slowest(asked, found)
    if slow is not None and slow.speed < 1:
        return Decision(asked, why, f"{asked} is {slow}: precision=fp32 would be faster")
    return Decision(asked, why)


@dataclass(frozen=True)
class _Slowest:
    """The rank that a precision is slowest on."""

    speed: float
    where: str

    def __str__(self) -> str:
        times, how = (self.speed, "as fast as") if self.speed >= 1 else (1 / self.speed, "slower than")
        return f"{times:.2g} times {how} fp32 {self.where}"


def _slowest(precision: str, found: Sequence[tuple[str, Speeds]]) -> _Slowest | None:
    """None where a rank does not compute in it."""
    if not all(precision in measured for _, measured in found):
        return None
    rank = min(range(len(found)), key=lambda rank: found[rank][1][precision])
    host, measured = found[rank]
    return _Slowest(measured[precision], "here" if len(found) == 1 else f"on rank {rank} ({host})")


def _fastest(found: Sequence[tuple[str, Speeds]], excluded: Collection[str]) -> Decision:
    """bf16, else fp16, if every rank does it well, else fp32."""
    said = "not every rank's device computes in bf16 or fp16"
    for precision in LOW:
        slowest = None if precision in excluded else _slowest(precision, found)
        if slowest is not None:
            said = f"{precision} is {slowest}"
            if slowest.speed >= WORTH_IT:
                return Decision(precision, f"auto: {said}")
    return Decision("fp32", f"auto: {said}")


def _speed(name: str, device: torch.device) -> float:
    """Speed of products in ``name``, as a multiple of their speed in fp32."""
    speed = _ratio(name, _SMALL, device)
    return speed if speed < EMULATED else _ratio(name, _LARGE.get(device.type, _LARGE["cuda"]), device)


def _ratio(name: str, shape: tuple[int, int, int], device: torch.device) -> float:
    """The shortest time of one product in fp32 by that in ``name``; both take turns, beside whatever else runs."""
    rows, inputs, outputs = shape
    best: dict[torch.dtype, float] = {}
    for _ in range(_TRIES):
        for dtype in (torch.float32, LOW[name]):
            x, weight = (torch.ones(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
            _finish(device)
            began = time.perf_counter()
            F.linear(x, weight)
            _finish(device)
            best[dtype] = min(time.perf_counter() - began, best.get(dtype, float("inf")))
    return best[torch.float32] / best[LOW[name]]


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
