"""What trials came to, read from what they left: the content of results.json, and how it differs from another."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study.jobs import spent
from study.places import Places
from study.trials import Trial

Outcome = dict[str, Any]

HEADLINE = ("mean_iou", "linear", "accuracy", "probe_linear", "psnr", "samples")
"""Of a trial's numbers, that by which two runs of it are compared: the first that it has."""
_POINTS = 60
"""Of a curve that is kept."""


def outcome(trial: Trial, places: Places) -> Outcome:
    """What a trial that is done came to, with what it was run with."""
    own = places.own(trial)
    read = {"tokenizer": _tokenizer, "shards": _shards, "probe": _probe}.get(trial.words[0], _run)
    took = {name: round(value) for name, value in spent(own).items()}
    return {**(places.record(trial) or {}), **took, **read(own)}


def unlike(found: Mapping[str, Outcome]) -> list[str]:
    """Arms of which trials differ by more than their seeds: a mean over them would mean nothing."""
    commands: dict[str, set[str]] = {}
    for name, each in found.items():
        if arm := _arm(name):
            plain = re.sub(r"(--run|--data|--out|--json) \S+|(seed|init_from)=\S+", "", each["command"])
            commands.setdefault(arm, set()).add(f"{plain} {each['recipe']}")
    return [arm for arm, different in commands.items() if len(different) > 1]


def _arm(name: str) -> str | None:
    """What trials share that differ by their seeds only: the name without them; None if it has none."""
    match = re.fullmatch(r"(.+)/\d+(-\d+)?", name)
    return match[1] if match else None


def differences(ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome]) -> Iterator[str]:
    """How repeated trials differ from earlier ones, a line for each; and a last line for all of them."""
    both = [name for name in ours if name in theirs]
    equal, largest = 0, 0.0
    for name in both:
        key = headline(ours[name])
        if key is None:
            continue
        now, before = ours[name]["numbers"][key], theirs[name]["numbers"].get(key)
        if before is None or _but_precision(ours[name]) != _but_precision(theirs[name]):
            yield f"{name}: another command than that of the earlier results"
        elif now == before:
            equal += 1
        else:
            largest = max(largest, abs(now - before))
            yield f"{name}: {key} {now:.4f}, earlier {before:.4f}, difference {now - before:+.4f}"
    other = {theirs[name]["machine"] for name in both} - {ours[name]["machine"] for name in both}
    where = f" (earlier on {'; '.join(sorted(other))})" if other else ""
    elsewise = sum(ours[name]["command"] != theirs[name]["command"] for name in both)
    where += f", {elsewise} of them in another precision or with another command" if elsewise else ""
    yield from _of_other_seeds(ours, theirs)
    if not both:
        yield "no trial is in both results with the same seeds"
    else:
        yield (
            f"{len(both)} trials are in both results{where}: {equal} equal to the last digit, "
            f"largest difference of the others {largest:.4f}"
        )


def _but_precision(found: Outcome) -> str:
    """The command without what machines differ in: bf16 where a processor is quick in it."""
    return re.sub(r" precision=\w+", "", found["command"])


def _of_other_seeds(ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome]) -> Iterator[str]:
    """Means of trials that differ from earlier ones by their seeds only."""
    for arm in dict.fromkeys(filter(None, map(_arm, ours))):
        now, before = ([name for name in each if _arm(name) == arm] for each in (ours, theirs))
        key = headline(ours[now[0]])
        known = [name for name in before if key in theirs[name]["numbers"]]
        if known and key is not None and set(now) != set(before):
            means = [
                statistics.fmean(each[name]["numbers"][key] for name in names)
                for each, names in ((ours, now), (theirs, known))
            ]
            yield f"{arm}: mean {key} {means[0]:.4f} of {len(now)}, earlier {means[1]:.4f} of {len(known)}"


def headline(found: Outcome) -> str | None:
    """The name of the number by which a trial is compared."""
    return next((name for name in HEADLINE if name in found["numbers"]), None)


def _run(own: Path) -> Outcome:
    """Pre-training, or fine-tuning."""
    measured = _lines(own / "validation.jsonl")
    trained = _lines(own / "metrics.jsonl")
    last = measured[-1] if measured else {}
    kept = ("loss", "accuracy", "top5_accuracy", "mean_iou", "probe_linear", "probe_knn")
    numbers = {name: last[name] for name in kept if isinstance(last.get(name), float)}
    curves = {"training": _curve(trained, "loss")}
    curves |= {name: _curve(measured, name) for name in ("accuracy", "probe_linear", "probe_knn")}
    return {
        "numbers": {**numbers, "steps": trained[-1]["step"], "training_loss": trained[-1]["loss"]},
        "curves": {name: curve for name, curve in curves.items() if len(curve) > 1},
    }


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Of a number, (step, mean of the steps since the point before)."""
    known = [line for line in lines if isinstance(line.get(name), float) and "step" in line]
    pieces = [
        known[at : at + max(1, len(known) // _POINTS)]
        for at in range(0, len(known), max(1, len(known) // _POINTS))
    ]
    return [[piece[-1]["step"], round(sum(line[name] for line in piece) / len(piece), 4)] for piece in pieces]


def _tokenizer(own: Path) -> Outcome:
    found = json.loads((own / "run" / "DONE").read_text())
    kept = {name: found[name] for name in ("psnr", "perplexity", "used", "commonest_share") if name in found}
    baselines = {f"psnr_{name}": value for name, value in found.get("baselines", {}).items()}
    return {"numbers": {**kept, **baselines}, "verdict": found["verdict"]["word"], "curves": {}}


def _shards(own: Path) -> Outcome:
    found = json.loads((own / "manifest.json").read_text())
    stored = sum(shard["samples"] for shard in found["shards"])
    return {"numbers": {"samples": stored // found["views"], "views": found["views"]}, "curves": {}}


def _probe(own: Path) -> Outcome:
    found = json.loads((own / "probe.json").read_text())
    best = {name: found[name]["accuracy"] for name in ("linear", "knn")}
    layers = {f"{name}_layer": found[name]["layer"] for name in ("linear", "knn")}
    curve = [[layer["layer"], layer["linear"]["test"]] for layer in found["layers"]]
    return {"numbers": {**best, **layers}, "curves": {"by_layer": curve}}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
