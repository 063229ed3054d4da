"""Run folders of any kind as a report reads them, made up: with numbers, and nothing trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from beit_dist.commands.pictures import kinds
from beit_dist.config.reading import validate
from beit_dist.reports.html.subject import Subject, open_subjects
from beit_dist.storage.access import Access

SMALL = {"width": 16, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8}
RECIPES: dict[str, dict[str, Any]] = {
    "pretraining": {"model": {**SMALL, "vocabulary": 64}, "masking": {"masked_patches": 6, "min_block": 4}},
    "classification": {"task": "classification", "model": SMALL},
    "segmentation": {"task": "segmentation", "model": SMALL},
    "tokenizer": {},
}
BASELINES = {
    "training": {"loss": {"uniform": 4.16, "frequency": 3.9}, "accuracy": {"commonest token": 0.1}},
    "held_out": {"loss": {"uniform": 4.16, "frequency": 4.0}, "accuracy": {"commonest token": 0.1}},
}


def steps_of(count: int, *, batch: int = 8, attempt: int = 1, begin: float = 1000.0) -> list[dict[str, Any]]:
    """Steps of two seconds each, fetched one by one; the loss falls from 4 and a tenth of the time waits."""
    return [
        {
            "step": step,
            "samples": batch * step,
            "loss": 4.0 - step / count,
            "accuracy": 0.3 * step / count,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "attempt": attempt,
            "time": begin + 2.0 * step,
            "images_per_second": batch / 2,
            "data_wait": 0.1,
            "peak_memory": 2_000_000_000,
        }
        for step in range(1, count + 1)
    ]


def make_run(
    folder: Path,
    kind: str = "pretraining",
    *,
    recipe: Mapping[str, Any] | None = None,
    steps: Sequence[Mapping[str, Any]] = (),
    measured: Sequence[Mapping[str, Any]] = (),
    baselines: Mapping[str, Any] = BASELINES,
    marker: tuple[str, Mapping[str, Any]] | None = ("DONE", {}),
) -> Path:
    """A run folder."""
    folder.mkdir(parents=True)
    config = validate(kinds()[kind].schema, {**RECIPES[kind], "run": "r", **(recipe or {})})
    facts = {"kind": kind, "attempt": 1, "total_steps": len(steps), "baselines": baselines, "world_size": 1}
    facts["versions"] = {"torch": "2.13.0"}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for name, lines in (("metrics.jsonl", steps), ("validation.jsonl", measured)):
        if lines:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if marker is not None:
        (folder / marker[0]).write_text(json.dumps({"time": 2000.0, **marker[1]}))
    return folder


def subjects(*folders: Path) -> list[Subject]:
    """As the page opens them."""
    return open_subjects([str(folder) for folder in folders], kinds(), Access(), 3000.0)
