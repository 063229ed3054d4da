"""A training step of the model alone: ours and others', in each precision, against the machine's own products."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from beit_dist.benches.contender import Contender, largest_product
from beit_dist.benches.contenders import CONTENDERS, UnavailableError
from beit_dist.benches.inputs import MASKED
from beit_dist.benches.measuring import Row, row
from beit_dist.config.model import ModelConfig
from beit_dist.engine.precision import speeds
from beit_dist.engine.task import OPERATIONS
from beit_dist.models.flops import multiply_adds

_CPU = {"small": (8, 4), "base": (8, 3)}
"""Images of a step, and how often each contender takes one."""
_GPU = {"base": (128, 20), "large": (64, 20)}
_QUICK = {"tiny": (4, 2)}
_EMULATED = 0.5
"""Precisions whose products are slower than this share of fp32's are left out: a step would take minutes."""


def measure(quick: bool, original: str | None = None, sizes: tuple[str, ...] = ()) -> Iterator[Row]:
    """Forward, loss and backward with the released settings, on a GPU if there is one.

    On a CPU all contenders of a case live at once, each in a process, and take their steps in turn. On a GPU one
    runs after the other, as its memory would not hold all.

    Args:
        quick: the smallest model, few steps.
        original: folder of the original code (microsoft/unilm, ``beit``).
        sizes: of models; those that suit the device, if none are named.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = _QUICK if quick else _GPU if device.type == "cuda" else _CPU
    wanted = {size: cases.get(size, (8, 3)) for size in sizes} or cases
    for size, (batch, repetitions) in wanted.items():
        best: dict[str, list[float]] = {}
        for precision in _precisions(device):
            case = f"{size}, batch {batch}, {precision}"
            taken, ceiling = _run(size, batch, precision, repetitions, original, in_turn=device.type == "cpu")
            yield from _rows(case, size, batch, taken, ceiling, largest_product(device))
            for name, seconds in taken.items():
                whose = name.partition(",")[0]
                best[whose] = min(seconds, best.get(whose, seconds), key=statistics.median)
        for peer, seconds in best.items():
            if peer != "ours" and "ours" in best:
                ratios = [theirs / own for theirs, own in zip(seconds, best["ours"], strict=True)]
                yield row("step", f"{size}, batch {batch}, best against best", f"ours / {peer}", ratios, "×")


def _precisions(device: torch.device) -> list[str]:
    """Those worth a contest; on a GPU only the fastest, since its minutes are few."""
    known = speeds(device)
    if device.type == "cuda":
        return [max(known, key=lambda name: known[name])]
    slow = {name: speed for name, speed in known.items() if speed < _EMULATED}
    for name, speed in slow.items():
        _note(f"{name}: left out, its products run at {speed:.2g} of the speed of fp32's here")
    return ["fp32", *(name for name in known if name not in slow)]


def _run(
    size: str, batch: int, precision: str, repetitions: int, original: str | None, *, in_turn: bool
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each contender's steps, and of the product of matrices between them."""
    taken: dict[str, list[float]] = {}
    products: list[float] = []
    with ExitStack() as alive:
        contenders: dict[str, Contender] = {}
        for name in CONTENDERS:
            if name == "original, tokenises" and in_turn:
                continue  # minutes on a CPU, for a ratio that says the same
            try:
                contender = Contender(name, size, batch, precision, original)
            except UnavailableError as reason:
                _note(f"{name}: left out: {reason}")
                continue
            if in_turn:
                contenders[name] = alive.enter_context(contender)
                continue
            with contender:
                taken[name] = contender.step(repetitions)
                products += contender.product(10)
        for _ in range(repetitions if in_turn else 0):
            for name, contender in contenders.items():
                taken.setdefault(name, []).extend(contender.step())
                products += contender.product(2)
    return taken, products


def _rows(
    case: str, size: str, batch: int, taken: dict[str, list[float]], products: list[float], side: int
) -> Iterator[Row]:
    work = batch * OPERATIONS * multiply_adds(ModelConfig(size=size), MASKED) / 1e12
    ceiling = 2e-12 * side**3 / statistics.median(products) if products else 0.0
    for name, seconds in taken.items():
        yield row("step", case, name, [batch / each for each in seconds], "images/s")
        yield row("step", case, name, [work / each / ceiling for each in seconds], "of the ceiling")
    if products:
        yield row("step", case, f"product of {side}²", [2e-12 * side**3 / p for p in products], "TFLOP/s")


def _note(text: str) -> None:
    print(f"step: {text}", file=sys.stderr, flush=True)
