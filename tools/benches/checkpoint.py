"""A save: how long it holds up training, how fast it writes against a plain sequential write, and its memory."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from beit_dist.config import CheckpointConfig
from beit_dist.engine.checkpoint.layout import Fragment
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.distributed import Agreement, Ranks
from beit_dist.storage.local import LocalPlace
from benches.measuring import Row, row, seconds


class _State:
    """Parameters and moments of a model of ``values`` parameters, as the engine's state presents them."""

    updates = 0
    loss_scale: dict[str, float]

    def __init__(self, values: int) -> None:
        self.loss_scale = {}
        roles = ("weight", "exp_avg", "exp_avg_sq")
        self.fragments = [Fragment("p", role, 0, torch.randn(values)) for role in roles]

    def saved_fragments(self) -> list[Fragment]:
        return self.fragments


def measure(quick: bool) -> list[Row]:
    """BEiT-base's 92 M parameters (1.1 GB) on one rank, in the folder of temporary files."""
    values = 4_000_000 if quick else 91_965_776
    state, case = _State(values), f"{12 * values / 1e6:,.0f} MB of state"
    size = 12 * values
    stalls, saves, plain, memory = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(
            LocalPlace(Path(folder) / "checkpoints"),
            CheckpointConfig(keep=1),
            Agreement(Ranks(), timedelta(seconds=60)),
        )
        store.begin_attempt()
        for step in range(1, (3 if quick else 5) + 1):
            with _PeakMemory() as peak:
                began = time.perf_counter()
                store.begin_save(step, state, {})  # type: ignore[arg-type]
                stalls.append(time.perf_counter() - began)
                store.finish_save()
                saves.append(time.perf_counter() - began)
            memory.append(peak.extra / size)
            plain.append(seconds(lambda: _plain_write(Path(folder) / "plain", state)))
    return [
        row("checkpoint", case, "held up", stalls, "s"),
        row("checkpoint", case, "ours, whole save", [size / 1e6 / t for t in saves], "MB/s"),
        row("checkpoint", case, "plain write, fsync", [size / 1e6 / t for t in plain], "MB/s"),
        row("checkpoint", case, "extra memory", memory, "× the state"),
    ]


def _plain_write(path: Path, state: _State) -> None:
    with path.open("wb") as file:
        for fragment in state.fragments:
            file.write(fragment.data.numpy().data)
        file.flush()
        os.fsync(file.fileno())


class _PeakMemory:
    """The most memory that the process took beyond what it had."""

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        return self._highest - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._highest = max(self._highest, self._process.memory_info().rss)
