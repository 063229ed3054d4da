"""results.md, from results.json and nothing else."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from study.curves import PICTURES
from study.spreads import COLOURS, NAMES, Found, gain, spread, verdict

AIMS = {100: 3.0, 10: 8.0}
"""Points of accuracy that pre-training should add, by the per cent of labels."""
PROBE_AIM = 15.0
COMPARISONS = 6
"""Of fine-tunings: two pre-trainings with three seeds each."""

_INTRODUCTION = """
Whether pre-training helps, by how much, and at what price, measured with models so small that two processor
cores can train them. [evidence.md](evidence.md) says how model and settings were chosen, how to repeat the
study, and what did not work. Each figure is the mean over seeds ± their standard deviation, with the number of
trials or comparisons in brackets. Accuracies and IoU are in per cent.
"""
_ON_LABELS = """
CIFAR-10, accuracy on the test images after fine-tuning. Pre-trained and random weights get the same labelled
images, batches and augmentation, and the learning rate and layer decay that suit each. The last two columns
compare runs with the same labels in the same order. All are measured on the same 2,000 images, so a difference
is uncertain by about a point, however many seeds there are.
"""
_ON_STREETS = """
The validation frames come from one drive, so the spread over seeds says nothing about other scenes. No setting
was chosen on frames held out.
"""
_ON_CHOICES = """
One seed, and training images only: a tenth of them is measured. `probe` is a linear probe after a quarter of
the epochs, fitted to the other nine tenths. The others are fine-tuned with 10 % of those.
"""


def write_page(found: Found, page: Path, images: Path) -> None:
    """Write the page, and its curves into a folder beside it."""
    drawn = [name for name, draw in PICTURES.items() if draw(found, images / name)]
    page.write_text("\n".join(_page(found, drawn, images.name)) + "\n")


def _page(found: Found, drawn: Sequence[str], folder: str) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "<!-- Written by tools/evidence.py from docs/results.json: change that, not this. -->"
    yield ""
    yield from _paragraph(_INTRODUCTION)
    machines = sorted({str(each["machine"]) for each in found.values()})
    hours = sum(each["cpu_seconds"] for each in found.values()) / 3600
    yield ""
    yield f"{len(found)} trials, {hours:.1f} hours of processor time, on: {'; '.join(machines) or 'none'}."
    for section in (_labels, _price, _probes, _objectives, _street, _others, _tokenizers, _choices):
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


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text.strip(), 115)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def _labels(found: Found) -> Iterator[str]:
    rows, said = [], []
    for share in (100, 10, 1):
        arms = {arm: spread(found, rf"finetune/{arm}/{share}/.*", "accuracy") for arm in COLOURS}
        if not any(arm.values for arm in arms.values()):
            continue
        pretrained = f"finetune/tokens-blocks/{share}"
        more, beyond = (gain(found, pretrained, f"finetune/{arm}/{share}") for arm in ("scratch", "scratch-4x"))
        rows.append([f"{share} %", *map(str, arms.values()), f"{more:+}", f"{beyond:+}"])
        if more.values and share in AIMS:
            aim = AIMS[share]
            said.append(
                f"- The aim with {share} % of the labels, {aim:+.0f} points, is {verdict(more, aim, COMPARISONS)}."
            )
    if rows:
        yield "## Pre-trained against random first weights"
        yield ""
        yield from _paragraph(_ON_LABELS)
        yield ""
        yield from _table(
            ["labels", *(NAMES[arm] for arm in COLOURS), "points more", "more than four times"], rows
        )
        yield from ("", *said) if said else ()


def _price(found: Found) -> Iterator[str]:
    """Processor time of what is compared."""
    kinds = {
        "tokenizer and shards": ("tokenizer/good", "shards/good-8"),
        "a pre-training": ("pretrain/tokens-blocks/.*",),
        **{
            f"a fine-tuning, {share} % of the labels": (f"finetune/tokens-blocks/{share}/.*",)
            for share in (100, 10, 1)
        },
        **{
            f"the same from random weights, four times, {share} %": (f"finetune/scratch-4x/{share}/.*",)
            for share in (100, 10, 1)
        },
    }
    rows = []
    for what, patterns in kinds.items():
        spent = [[e["cpu_seconds"] for n, e in found.items() if re.fullmatch(p, n)] for p in patterns]
        if all(spent):
            rows.append([what, f"{sum(sum(each) / len(each) for each in spent) / 60:.0f}"])
    if rows:
        yield from ("## The price", "", *_table(["what", "minutes of a core"], rows))


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
    more = gain(found, "probe/tokens-blocks", "probe/random", "linear")
    yield ""
    than = f"The aim, {PROBE_AIM:.0f} points more than the same weights before the first step"
    yield f"{than}, is {verdict(more, PROBE_AIM, 2)}."


def _arms(found: Found, names: Sequence[str]) -> list[list[str]]:
    rows = []
    for arm in names:
        columns = [
            spread(found, f"probe/{arm}/.*", "linear"),
            *(spread(found, f"finetune/{arm}/{share}/.*", "accuracy") for share in (10, 100)),
        ]
        if any(column.values for column in columns):
            rows.append([NAMES.get(arm, arm.replace("-", " ")), *map(str, columns)])
    return rows


_HEAD = ["pre-training", "linear probe", "10 % of labels", "100 % of labels"]


def _objectives(found: Found) -> Iterator[str]:
    rows = _arms(found, ("tokens-blocks", "pixels-blocks", "tokens-random"))
    if len(rows) > 1:
        rows[0][0] = "tokens, blocks" if rows[0][0] == "pre-trained" else rows[0][0]
        yield from ("## Tokens against pixels, blocks against single patches", "", *_table(_HEAD, rows))
        yield ""
        for arm in ("pixels-blocks", "tokens-random"):
            for share in (10, 100):
                more = gain(found, f"finetune/tokens-blocks/{share}", f"finetune/{arm}/{share}")
                if more.values:
                    yield f"- Tokens and blocks, {share} % of the labels, against {NAMES[arm]}: {more:+} points."


def _street(found: Found) -> Iterator[str]:
    rows = []
    for arm in ("pretrained", "scratch"):
        numbers = [spread(found, f"segment/{arm}/.*", number) for number in ("mean_iou", "accuracy")]
        if numbers[0].values:
            rows.append([arm.replace("pretrained", "pre-trained"), *map(str, numbers)])
    if rows:
        more = gain(found, "segment/pretrained", "segment/scratch", "mean_iou")
        yield from (
            "## Segmentation of CamVid",
            "",
            *_paragraph(_ON_STREETS),
            "",
            *_table(["first weights", "mean IoU", "pixel accuracy"], rows),
            "",
            f"With the same seeds: {more:+} points of mean IoU.",
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
        yield from _paragraph(_ON_CHOICES)
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
