"""A training step of the model alone: ours and others', in each precision, against the machine's own products."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from beit_dist.benches.contender import Contender, largest_product
from beit_dist.benches.contenders import CONTENDERS, UnavailableError
from beit_dist.benches.inputs import MASKED
from beit_dist.benches.measuring import Row, row
from beit_dist.config.model import ModelConfig
from beit_dist.engine.precision import EMULATED, speeds
from beit_dist.engine.task import OPERATIONS
from beit_dist.models.flops import multiply_adds
from beit_dist.planning.devices import known_gpu

_CPU = {"small": (8, 4), "base": (8, 3)}
"""Images of a step, and how often each contender takes one."""
_GPU = {"base": (128, 20), "large": (64, 20)}
_QUICK = {"tiny": (4, 2)}


def measure(
    quick: bool,
    original: str | None = None,
    sizes: tuple[str, ...] = (),
    names: tuple[str, ...] = tuple(CONTENDERS),
) -> Iterator[Row]:
    """Forward, loss and backward with the released settings, on a GPU if there is one.

    On a CPU all contenders of a case live at once, each in a process, and take their steps in turn. On a GPU one
    runs after the other, as its memory would not hold all.

    Args:
        quick: the smallest model, few steps.
        original: folder of the original code (microsoft/unilm, ``beit``).
        sizes: of models; those that suit the device, if none are named.
        names: of the contenders.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = _QUICK if quick else _GPU if device.type == "cuda" else _CPU
    for size, (batch, repetitions) in ({size: cases.get(size, (8, 3)) for size in sizes} or cases).items():
        best: dict[str, list[float]] = {}
        for precision in _precisions(device):
            case = _Case(size, batch, precision, device, original)
            run = case.in_turn if device.type == "cpu" else case.one_by_one
            for name, seconds, products in run(names, repetitions):
                yield from case.rows(name, seconds, products)
                whose = name.partition(",")[0]
                best[whose] = min(seconds, best.get(whose, seconds), key=statistics.median)
        for peer, seconds in best.items():
            if peer != "ours" and "ours" in best:
                ratios = [theirs / own for theirs, own in zip(seconds, best["ours"], strict=True)]
                yield row("step", f"{size}, batch {batch}, best against best", f"ours / {peer}", ratios, "×")


def mfu_rows(bench: str, case: str, who: str, rates: list[float], precision: str) -> Iterator[Row]:
    """Of a GPU whose datasheet is known, the share of its dense peak.

    Args:
        rates: TFLOP/s.
    """
    gpu = known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is not None:
        yield row(bench, case, who, [1e12 * rate / gpu.peaks[precision] for rate in rates], "MFU")


Taken = tuple[str, list[float], list[float]]
"""A contender's name, seconds of its steps, and of large products between them."""


@dataclass(frozen=True)
class _Case:
    """What all contenders run."""

    size: str
    batch: int
    precision: str
    device: torch.device
    original: str | None

    def in_turn(self, names: tuple[str, ...], repetitions: int) -> Iterator[Taken]:
        """All live at once and take a step each, again and again; products are those of all."""
        taken: dict[str, list[float]] = {}
        products: list[float] = []
        with ExitStack() as alive:
            living = {name: alive.enter_context(each) for name in names if (each := self._contender(name))}
            for _ in range(repetitions):
                for name, contender in living.items():
                    taken.setdefault(name, []).extend(contender.step())
                    products += contender.product(2)
        for name, seconds in taken.items():
            yield name, seconds, products

    def one_by_one(self, names: tuple[str, ...], repetitions: int) -> Iterator[Taken]:
        """Each has the device to itself, from its first step to its last."""
        for name in names:
            if contender := self._contender(name):
                with contender:
                    yield name, contender.step(repetitions), contender.product(10)

    def rows(self, name: str, seconds: list[float], products: list[float]) -> Iterator[Row]:
        """What there is to say of a contender."""
        case, side = f"{self.size}, batch {self.batch}, {self.precision}", largest_product(self.device)
        work = self.batch * OPERATIONS * multiply_adds(ModelConfig(size=self.size), MASKED) / 1e12
        ceiling = 2e-12 * side**3 / statistics.median(products)
        yield row("step", case, name, [self.batch / each for each in seconds], "images/s")
        yield row("step", case, name, [work / each / ceiling for each in seconds], f"of {side}² product")
        yield from mfu_rows("step", case, name, [work / each for each in seconds], self.precision)

    def _contender(self, name: str) -> Contender | None:
        """None where it is not to be had, or takes minutes on a CPU for a ratio that says the same."""
        if name == "original, tokenises" and self.device.type == "cpu":
            return None
        try:
            return Contender(name, self.size, self.batch, self.precision, self.original)
        except UnavailableError as reason:
            _note(f"{name}: left out: {reason}")
            return None


def _precisions(device: torch.device) -> list[str]:
    """Those worth a contest; on a GPU only the fastest, since its minutes are few."""
    known = speeds(device)
    if device.type == "cuda":
        return [max(known, key=lambda name: known[name])]
    slow = {name: speed for name, speed in known.items() if speed < EMULATED}
    for name, speed in slow.items():
        _note(f"{name}: left out, its products run at {speed:.2g} of the speed of fp32's here")
    return ["fp32", *(name for name in known if name not in slow)]


def _note(text: str) -> None:
    print(f"step: {text}", file=sys.stderr, flush=True)
