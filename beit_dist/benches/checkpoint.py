"""A save of a real engine: how long it holds up training, how it slows the steps beside it, its speed and memory.

The yardsticks are the same bytes written in one go and made durable, once through the page cache and once past it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from beit_dist.benches.inputs import MASKED, inputs
from beit_dist.benches.measuring import Row, row, seconds
from beit_dist.checkpoints.image import FileImage
from beit_dist.checkpoints.layout import Fragment
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.precision import choose, speeds
from beit_dist.engine.ranks.distributed import Agreement, Ranks, close_process_groups, init_process_groups
from beit_dist.engine.resolve import resolve
from beit_dist.engine.wrapped import build_engine
from beit_dist.storage.local import LocalPlace
from beit_dist.tasks.pretraining.task import Pretraining

BATCH = 8
_LIMIT = timedelta(minutes=10)


def measure(quick: bool) -> list[Row]:
    """BEiT-base (1.1 GB of state) on one rank, in the folder of temporary files, in the precision that suits."""
    size = "tiny" if quick else "base"
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainingConfig(run=folder, model={"size": size}, global_batch=BATCH, micro_batch=BATCH)
        ranks = Ranks()
        device = init_process_groups(ranks, _LIMIT)
        try:
            low = choose("auto", "", None, [("", speeds(device))]).precision == "bf16"
            settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": low}}
            engine = build_engine(Pretraining(config), resolve(config, settings, 1), device)
            batch = inputs(config.model, BATCH, device)

            def step() -> None:
                engine.backward(engine(*batch)[0] / (BATCH * MASKED), scale_wrt_gas=False)
                engine.step()

            state = EngineState(engine, ranks)
            store = CheckpointStore(
                LocalPlace(Path(folder) / "checkpoints"), config.checkpoint, Agreement(ranks, _LIMIT)
            )
            store.begin_attempt()
            taken = _measure(store, state, step, device, Path(folder), 2 if quick else 5)
        finally:
            close_process_groups()
    return taken.rows(f"{taken.bytes / 1e6:,.0f} MB of state ({size})")


@dataclass
class _Taken:
    """What was measured: seconds, one for each repetition, but for the first three."""

    bytes: int
    memory: float
    first: float
    stalls: list[float]
    saves: list[float]
    plain: list[float]
    direct: list[float]
    alone: list[float]
    beside: list[float]

    def rows(self, case: str) -> list[Row]:
        def add(who: str, values: list[float], unit: str) -> Row:
            return row("checkpoint", case, who, values, unit)

        def speed(times: list[float]) -> list[float]:
            return [self.bytes / 1e6 / t for t in times]

        ratios = [[p / s for p, s in zip(t, self.saves, strict=True)] for t in (self.plain, self.direct)]
        return [
            add("a step, batch 8", self.alone, "s"),
            add("a step beside a save", self.beside, "s"),
            add("held up", self.stalls, "s"),
            add("held up, first save", [self.first], "s"),
            add("held up", [s / a for s, a in zip(self.stalls, self.alone, strict=True)], "× a step"),
            add("whole save", speed(self.saves), "MB/s"),
            add("plain write", speed(self.plain), "MB/s"),
            add("plain direct write", speed(self.direct), "MB/s"),
            add("save", ratios[0], "× plain"),
            add("save", ratios[1], "× direct"),
            add("extra memory", [self.memory], "× the state"),
        ]


def _measure(
    store: CheckpointStore,
    state: EngineState,
    step: Callable[[], None],
    device: torch.device,
    folder: Path,
    repetitions: int,
) -> _Taken:
    state.saved_fragments()  # the optimizer's moments come into being
    for _ in range(2):
        step()
    size = 4 * sum(fragment.length for fragment in state.saved_fragments())
    numbers = iter(range(1, 1000))

    def begin_save(urgent: bool = False) -> float:
        return seconds(lambda: store.begin_save(next(numbers), state, {}, urgent=urgent))

    with _PeakMemory() as peak:
        store.prepare(state, device)
        store.find_memory()
        step()
        first = begin_save()
        store.finish_save()
    # Steps take memory and give it back, and the copy is all that lies beneath the peak of two saves in a row.
    with _PeakMemory() as again:
        begin_save()
        store.finish_save()
    taken = _Taken(size, 0.0, first, [], [], [], [], [], [])
    image = FileImage.of(state.saved_fragments())
    taken.memory = (max(peak.before, again.highest) - peak.before) / size
    for _ in range(repetitions):
        taken.alone.append(seconds(step))
        taken.stalls.append(begin_save())
        taken.beside.append(seconds(step))
        store.finish_save()
        began = time.perf_counter()
        begin_save(urgent=True)
        store.finish_save()
        taken.saves.append(time.perf_counter() - began)
        taken.plain.append(seconds(lambda: _plain_write(folder / "plain", state.saved_fragments())))
        taken.direct.append(seconds(lambda: _direct_write(folder / "direct", image)))
    return taken


def _plain_write(path: Path, fragments: list[Fragment]) -> None:
    with path.open("wb") as file:
        for fragment in fragments:
            file.write(fragment.data.cpu().numpy().data)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _direct_write(path: Path, image: FileImage) -> None:
    """Whole pages from aligned memory, where the file system can; the last page is left out."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    end = len(image.bytes) // 4096 * 4096
    for low in range(0, end, 16 << 20):
        os.write(descriptor, image.bytes[low : min(end, low + (16 << 20))])
    os.fsync(descriptor)
    os.close(descriptor)
    path.unlink()


class _PeakMemory:
    """The most memory that the process had while it ran, in bytes."""

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        self.before = self.highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.highest = max(self.highest, self._process.memory_info().rss)
