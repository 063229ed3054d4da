"""The pictures of results.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.spreads import BLIND, COLOURS, NAMES, Found, spread


def labels(found: Found, out: Path) -> bool:
    """Accuracy by the share of labels."""
    shares = (1, 10, 100)
    arms = {arm: [spread(found, rf"finetune/{arm}/{s}/.*", "accuracy") for s in shares] for arm in COLOURS}
    if not any(each.values for arm in arms.values() for each in arm):
        return False
    figure, axes = _axes("labelled images, per cent", "accuracy, per cent")
    for arm, spreads in arms.items():
        known = [(share, each) for share, each in zip(shares, spreads, strict=True) if each.values]
        if known:
            at, values = zip(*known, strict=True)
            errors = [100 * each.deviation for each in values]
            heights = [100 * each.mean for each in values]
            axes.errorbar(at, heights, errors, color=COLOURS[arm], marker="o", capsize=3, label=NAMES[arm])
    axes.axhline(100 * BLIND, color="0.5", linestyle=":", label="always the same class")
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share} %" for share in shares])
    return _saved(figure, axes, out)


def probes(found: Found, out: Path) -> bool:
    """The quick probe by the steps of pre-training."""
    curves = {
        name: each["curves"]["probe_linear"]
        for name, each in found.items()
        if name.startswith("pretrain/") and "probe_linear" in each["curves"]
    }
    if not curves:
        return False
    figure, axes = _axes("steps of pre-training", "quick linear probe, per cent (± 2)")
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, [100 * value for value in values], marker="o", markersize=3, label=name.partition("/")[2])
    return _saved(figure, axes, out)


def _axes(right: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(right)
    axes.set_ylabel(up)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _saved(figure: Any, axes: Any, out: Path) -> bool:
    axes.legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})
    return True


PICTURES: dict[str, Callable[[Found, Path], bool]] = {"results_labels.png": labels, "results_probes.png": probes}
"""Each returns whether there was something to draw."""
