"""results.md and its curves, from results.json and nothing else."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Found = Mapping[str, Mapping[str, Any]]

BLIND = 0.1
"""Accuracy of always answering the same of ten classes."""
AIMS = {100: 3.0, 10: 8.0}
"""Points of accuracy that pre-training should add, by the per cent of labels."""
PROBE_AIM = 15.0
_COLOURS = {"tokens-blocks": "#0072b2", "scratch": "#d55e00", "scratch-4x": "#e69f00"}
_NAMES = {
    "tokens-blocks": "pre-trained",
    "scratch": "from random weights",
    "scratch-4x": "from random weights, four times the epochs",
    "pixels-blocks": "pixels, blocks",
    "tokens-random": "tokens, single patches",
    "absolute": "absolute positions",
}


class Spread(NamedTuple):
    """Some trials that differ by their seeds only."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __format__(self, sign: str) -> str:
        """In per cent; as a difference with ``+``."""
        if not self.values:
            return "not run"
        spread = f" ± {100 * self.deviation:.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:{sign}.1f}{spread} ({len(self.values)})"

    def __str__(self) -> str:
        return format(self)


def spread(found: Found, pattern: str, number: str) -> Spread:
    """A number of all trials whose whole name matches."""
    values = [f["numbers"].get(number) for name, f in found.items() if re.fullmatch(pattern, name)]
    return Spread(tuple(value for value in values if value is not None))


def gain(found: Found, share: int) -> Spread:
    """What pre-training adds to the accuracy at a share of the labels: of each seed of the fine-tuning, by which
    labels and order are drawn, the mean over the pre-trainings less that from random weights."""
    seeds = [name.rpartition("/")[2] for name in found if name.startswith(f"finetune/scratch/{share}/")]
    pairs = [
        (spread(found, rf"finetune/tokens-blocks/{share}/\d+-{seed}", "accuracy"), number)
        for seed in seeds
        for number in spread(found, f"finetune/scratch/{share}/{seed}", "accuracy").values
    ]
    return Spread(tuple(pretrained.mean - scratch for pretrained, scratch in pairs if pretrained.values))


def write_page(found: Found, page: Path, images: Path) -> None:
    """Write the page, and its curves into a folder beside it."""
    drawn = [name for name, draw in _PICTURES.items() if draw(found, images / name)]
    page.write_text("\n".join(_page(found, drawn, images.name)) + "\n")


def _page(found: Found, drawn: Sequence[str], folder: str) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "<!-- Written by tools/evidence.py from docs/results.json: change that, not this. -->"
    yield ""
    yield "Whether pre-training helps, by how much, and at what price: measured with small models that two cores"
    yield "can train. [evidence.md](evidence.md) says how model and settings were chosen, how to repeat it, and"
    yield "what did not work. Each figure is the mean over seeds ± their standard deviation, and in brackets how"
    yield "many trials it is of. Accuracies and IoU are in per cent."
    machines = sorted({str(each["machine"]) for each in found.values()})
    hours = sum(each["cpu_seconds"] for each in found.values()) / 3600
    yield ""
    yield f"{len(found)} trials, {hours:.1f} hours of processor time, on: {'; '.join(machines) or 'none'}."
    for section in (_labels, _probes, _objectives, _street, _others, _tokenizers, _choices):
        rows = list(section(found))
        if rows:
            yield from ("", *rows)
    for name in drawn:
        yield from ("", f"![{name.removesuffix('.png').replace('_', ' ')}]({folder}/{name})")
    yield from ("", "## Every trial", "")
    yield "Paths are those of `make evidence`. Seconds are of processor time."
    yield ""
    yield "```"
    for name, each in found.items():
        values = ", ".join(f"{key} {value:.4g}" for key, value in each["numbers"].items())
        yield f"{name}: {values}; {each['cpu_seconds']} s"
        yield f"  {each['command']}"
    yield "```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def _labels(found: Found) -> Iterator[str]:
    rows, said = [], []
    for share in (100, 10, 1):
        arms = {arm: spread(found, rf"finetune/{arm}/{share}/.*", "accuracy") for arm in _COLOURS}
        if not any(arm.values for arm in arms.values()):
            continue
        more = gain(found, share)
        rows.append([f"{share} %", *map(str, arms.values()), f"{more:+}" if more.values else ""])
        if more.values and share in AIMS:
            reached = "reached" if 100 * more.mean >= AIMS[share] else "not reached"
            said.append(
                f"The aim with {share} % of the labels, {AIMS[share]:+.0f} points, is {reached}: {more:+}."
            )
    if rows:
        yield "## Pre-trained against random first weights"
        yield ""
        yield "CIFAR-10, accuracy on 2,000 test images after fine-tuning. All first weights get the same labelled"
        yield "images, batches and augmentation. One accuracy has a standard error of about 1.1 points. The last"
        yield "column compares runs with the same labels in the same order."
        yield ""
        yield from _table(["labels", *(_NAMES[arm] for arm in _COLOURS), "pre-trained, points more"], rows)
        yield from ("", *said) if said else ()


def _probes(found: Found) -> Iterator[str]:
    random = {number: spread(found, "probe/random/.*", number) for number in ("linear", "knn")}
    trained = {number: spread(found, "probe/tokens-blocks/.*", number) for number in ("linear", "knn")}
    if not random["linear"].values or not trained["linear"].values:
        return
    yield "## What frozen features are worth"
    yield ""
    yield "Best layer by held-out training images (docs/probes.md), accuracy on the test images."
    yield ""
    rows = [["pre-trained", *map(str, trained.values())], ["random weights", *map(str, random.values())]]
    yield from _table(["backbone", "linear probe", "20 nearest neighbours"], rows)
    gain = 100 * (trained["linear"].mean - random["linear"].mean)
    yield ""
    reached = "reached" if gain >= PROBE_AIM else "not reached"
    yield f"The aim, {PROBE_AIM:.0f} points more than random weights, is {reached}: {gain:+.1f}."


def _arms(found: Found, names: Sequence[str]) -> list[list[str]]:
    rows = []
    for arm in names:
        columns = [
            spread(found, f"probe/{arm}/.*", "linear"),
            *(spread(found, f"finetune/{arm}/{share}/.*", "accuracy") for share in (10, 100)),
        ]
        if any(column.values for column in columns):
            rows.append([_NAMES.get(arm, arm.replace("-", " ")), *map(str, columns)])
    return rows


_HEAD = ["pre-training", "linear probe", "10 % of labels", "100 % of labels"]


def _objectives(found: Found) -> Iterator[str]:
    rows = _arms(found, ("tokens-blocks", "pixels-blocks", "tokens-random"))
    if len(rows) > 1:
        rows[0][0] = "tokens, blocks" if rows[0][0] == "pre-trained" else rows[0][0]
        yield from ("## Tokens against pixels, blocks against single patches", "", *_table(_HEAD, rows))


def _street(found: Found) -> Iterator[str]:
    rows = []
    for arm in ("pretrained", "scratch"):
        numbers = [spread(found, f"segment/{arm}/.*", number) for number in ("mean_iou", "accuracy")]
        if numbers[0].values:
            rows.append([arm.replace("pretrained", "pre-trained"), *map(str, numbers)])
    if rows:
        yield from (
            "## Segmentation of CamVid",
            "",
            *_table(["first weights", "mean IoU", "pixel accuracy"], rows),
        )


def _others(found: Found) -> Iterator[str]:
    known = ("tokens-blocks", "pixels-blocks", "tokens-random", "random", "camvid")
    arms = [name.split("/")[1] for name in found if name.startswith("pretrain/")]
    rows = _arms(found, [arm for arm in dict.fromkeys(arms) if arm not in known])
    if rows:
        yield from ("## Views, positions, tokenizers, length", "")
        yield "One seed of pre-training. Compare with tokens and blocks above: 8 stored views, 24 epochs."
        yield from ("", *_table(_HEAD, rows))


def _choices(found: Found) -> Iterator[str]:
    rows = []
    for name in found:
        if name.startswith("choose/") and not name.startswith("choose/pretrain/"):
            number = "linear" if name.startswith("choose/probe/") else "accuracy"
            rows.append([name.removeprefix("choose/"), str(spread(found, re.escape(name), number))])
    if rows:
        yield from ("## How settings were chosen", "")
        yield "One seed, training images only, a tenth of which is measured. `probe`: a linear probe, fitted to"
        yield "the other nine tenths, after a quarter of the epochs. The others: fine-tuned with 10 % of those."
        yield from ("", *_table(["what", "accuracy"], rows))


def _tokenizers(found: Found) -> Iterator[str]:
    rows = []
    for name, each in found.items():
        if name.startswith("tokenizer/"):
            numbers = each["numbers"]
            decibels = [
                f"{numbers[key]:.2f}" for key in ("psnr", "psnr_palette", "psnr_mean_colour") if key in numbers
            ]
            rows.append([name.partition("/")[2], *decibels, f"{numbers['perplexity']:.0f}", each["verdict"]])
    if rows:
        head = ["tokenizer", "PSNR, dB", "palette's", "mean colours'", "perplexity", "verdict"]
        yield from ("## Tokenizers", "", *_table(head, rows))


def _draw_labels(found: Found, out: Path) -> bool:
    shares = (1, 10, 100)
    arms = {arm: [spread(found, rf"finetune/{arm}/{s}/.*", "accuracy") for s in shares] for arm in _COLOURS}
    if not any(each.values for arm in arms.values() for each in arm):
        return False
    figure, axes = _axes("labelled images, per cent", "accuracy, per cent")
    for arm, spreads in arms.items():
        known = [(share, each) for share, each in zip(shares, spreads, strict=True) if each.values]
        if known:
            at, values = zip(*known, strict=True)
            errors = [100 * each.deviation for each in values]
            heights = [100 * each.mean for each in values]
            axes.errorbar(at, heights, errors, color=_COLOURS[arm], marker="o", capsize=3, label=_NAMES[arm])
    axes.axhline(100 * BLIND, color="0.5", linestyle=":", label="always the same class")
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share} %" for share in shares])
    return _saved(figure, axes, out)


def _draw_probes(found: Found, out: Path) -> bool:
    curves = {
        name: each["curves"]["probe_linear"]
        for name, each in found.items()
        if name.startswith("pretrain/") and "probe_linear" in each["curves"]
    }
    if not curves:
        return False
    figure, axes = _axes("steps of pre-training", "linear probe, per cent")
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


_PICTURES = {"results_labels.png": _draw_labels, "results_probes.png": _draw_probes}
