"""Tokenizers small enough to be trained in a test, in its process, which is then the only rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit_dist.checkpoints.layout import committed
from beit_dist.config.reading import validate
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.launch import train
from beit_dist.engine.process import Process
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.ranks.preemption import StopRequest
from beit_dist.engine.ranks.timeouts import Timeouts
from beit_dist.engine.ranks.watchdog import Watchdog
from beit_dist.engine.resolve import resolve
from beit_dist.engine.run_folder import RunFolder
from beit_dist.storage.local import LocalPlace
from beit_dist.tasks.tokenizer.task import TokenizerTraining

TINY: dict[str, Any] = {
    "model": {"vocabulary": 16, "hidden": 8, "blocks_per_group": 1, "decoder_input": 8},
    "view_size": 32,
    "image_size": 16,
    "global_batch": 4,
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

    def config(self, **changes: Any) -> TokenizerConfig:
        """The recipe, with its run folder and images."""
        places = {"run": str(self.run), "data": str(self.images)}
        return validate(TokenizerConfig, TINY | self.settings | changes | places)

    def start(self, stop: StopRequest | None = None, ds: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """Start it once; the marker it leaves."""
        if not {"bf16", "fp16"} & set(ds or ()):
            changes.setdefault("precision", "fp32")  # fast on every machine
        config = self.config(**changes)
        task = TokenizerTraining(config, self.out, built_in=ds is None)
        timeouts = Timeouts(config.timeouts, config.checkpoint.timeout_seconds)
        watchdog = Watchdog(config.watchdog, self.run / "ranks", 0)
        process = Process(
            Agreement(Ranks(), timeouts.start), self.device, stop or StopRequest(), watchdog, timeouts
        )
        try:
            task.check(Ranks())
            return train(task, resolve(config, ds, 1), RunFolder(self.run), process)
        finally:
            watchdog.close()

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """What was recorded, without what belongs to the start that did."""
        text = (self.run / name).read_text()
        return [
            {
                k: v
                for k, v in json.loads(line).items()
                if k not in ("attempt", "seconds", "time", "images_per_second", "data_wait", "peak_memory")
            }
            for line in text.splitlines()
        ]

    def facts(self) -> dict[str, Any]:
        """run.json."""
        found: dict[str, Any] = json.loads((self.run / "run.json").read_text())
        return found

    def state(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Of the newest checkpoint: step, digests of weights, moments and average, and the codebook's counts."""
        saved = committed(LocalPlace(self.run / "checkpoints"))[0]
        return saved.step, saved.manifest["state_digests"], saved.manifest["position"]["codebook"]


def picture(number: int, side: int = 40) -> np.ndarray:
    """Two colours meeting at a slanted edge, different for each number."""
    draw = np.random.Generator(np.random.Philox(number))
    y, x = np.mgrid[:side, :side] / side
    edge = np.cos(a := draw.uniform(0, 6.3)) * (x - 0.5) + np.sin(a) * (y - 0.5) > 0
    return np.where(edge[..., None], draw.integers(0, 256, 3), draw.integers(0, 256, 3)).astype(np.uint8)
