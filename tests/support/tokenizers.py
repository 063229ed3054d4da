"""Tokenizers small enough to be trained in a test, in its process, which is then the only rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit_dist.data.image_files import find_images
from beit_dist.engine.checkpoint.layout import committed
from beit_dist.engine.distributed import Agreement, Ranks
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.process import Process
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.tokenizer.build import resolve
from beit_dist.engine.tokenizer.launch import Job, train
from beit_dist.engine.watchdog import Watchdog
from beit_dist.settings import validate
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizer_config import TokenizerRecipe

TINY: dict[str, Any] = {
    "model": {"vocabulary": 16, "hidden": 8, "blocks_per_group": 1, "decoder_input": 8},
    "view_size": 32,
    "image_size": 16,
    "batch": 4,
    "steps": 6,
    "held_out": 3,
    "usage_weight": 10.0,
    "kl_weight": 0.1,
    "collapse": {"below": None},
    "checkpoint": {"every_minutes": None},
    "logging": {"metrics_port": None, "progress": False, "every_steps": 2},
}


class StopAfter(StopRequest):
    """Asked to stop before the step after ``steps`` of this start."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    @property
    def requested(self) -> bool:
        self._left -= 1
        if self._left < 0:
            self.name = "SIGTERM"
        return self._left < 0

    @property
    def known(self) -> bool:
        return self.name is not None


@dataclass
class Training:
    """A tokenizer to be trained in this process."""

    out: Path
    images: Path
    device: torch.device
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.out.with_suffix(".run")

    def recipe(self, **changes: Any) -> TokenizerRecipe:
        """The recipe, with its run folder."""
        return validate(TokenizerRecipe, TINY | self.settings | changes | {"run": str(self.run)})

    def start(self, stop: StopRequest | None = None, ds: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """Start it once; the marker it leaves."""
        if not {"bf16", "fp16"} & set(ds or ()):
            changes.setdefault("precision", "fp32")  # fast on every machine
        recipe = self.recipe(**changes)
        job = Job(str(self.images), self.out, recipe, resolve(recipe, ds, 1), ds is None)
        timeouts = Timeouts(recipe.timeouts, recipe.checkpoint.timeout_seconds)
        watchdog = Watchdog(recipe.watchdog, self.run / "ranks", 0)
        agreement = Agreement(Ranks(), timeouts.start)
        files = find_images(str(self.images))
        try:
            return train(job, files, Process(agreement, self.device, stop or StopRequest(), watchdog, timeouts))
        finally:
            watchdog.close()

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """What was recorded, without the number of the start."""
        text = (self.run / name).read_text()
        return [{k: v for k, v in json.loads(line).items() if k != "attempt"} for line in text.splitlines()]

    def state(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Of the newest checkpoint: step, digests of weights, moments and average, and the codebook's counts."""
        saved = committed(LocalPlace(self.run / "checkpoints"))[0]
        return saved.step, saved.manifest["state_digests"], saved.manifest["codebook"]


def picture(number: int, side: int = 40) -> np.ndarray:
    """Two colours meeting at a slanted edge, different for each number."""
    draw = np.random.Generator(np.random.Philox(number))
    y, x = np.mgrid[:side, :side] / side
    edge = np.cos(a := draw.uniform(0, 6.3)) * (x - 0.5) + np.sin(a) * (y - 0.5) > 0
    return np.where(edge[..., None], draw.integers(0, 256, 3), draw.integers(0, 256, 3)).astype(np.uint8)
