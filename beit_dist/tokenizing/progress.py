"""How far a worker is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from beit_dist.tokenizing.metrics import Metrics

_LINE_SECONDS = 60.0


class Progress:
    """Images and shards of one worker.

    Args:
        name: of the worker, as the log should call it.
        images: of all its shards, with how many of them an earlier start has done.
        shards: likewise.
        metrics: told the same.
    """

    def __init__(self, name: str, images: tuple[int, int], shards: tuple[int, int], metrics: Metrics) -> None:
        self._name, self._metrics = name, metrics
        (self._images, done), (self._shards, self._shards_done) = images, shards
        self._done = self._kept = done
        self._began = self._said = time.monotonic()
        self._bar = tqdm(total=self._images, initial=done, desc=name, unit=" images", disable=None)
        metrics.plan(self._images, self._shards, done, self._shards_done)

    def images(self, count: int) -> None:
        """So many more are written or rejected."""
        self._done += count
        self._bar.update(count)
        self._metrics.images(count)
        if self._bar.disable and time.monotonic() - self._said > _LINE_SECONDS:
            self._say()

    def shard(self) -> None:
        """One more is committed."""
        self._shards_done += 1
        self._metrics.shard()

    def _say(self) -> None:
        self._said = now = time.monotonic()
        rate = (self._done - self._kept) / (now - self._began)
        left = (self._images - self._done) / rate if rate else 0.0
        print(
            f"{self._name}: {self._done:,} of {self._images:,} images, "
            f"{self._shards_done} of {self._shards} shards, {rate:,.1f} images/s, "
            f"{tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
