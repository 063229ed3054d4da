"""How long a rank waits for another: long while a run starts, short once steps follow one another.

The first step compiles, allocates and connects, at its own pace on each host; afterwards all ranks end a step
at the same time, and one that does not answer is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from beit_dist.config.run import TimeoutsConfig
from beit_dist.engine.ranks.distributed import set_timeouts


class Timeouts:
    """The limits of all process groups of this rank, changed in the course of a run.

    Args:
        settings: the recipe's section.
        save_seconds: how long a checkpoint may take before it counts as failed.
    """

    def __init__(self, settings: TimeoutsConfig, save_seconds: float) -> None:
        self.start = timedelta(minutes=settings.start_minutes)
        self._step = timedelta(minutes=settings.step_minutes)
        self._save = self._step + timedelta(seconds=save_seconds)
        self._in_steps = False

    @property
    def now(self) -> str:
        """The limit that holds now, as a setting and its value."""
        name, limit = ("step", self._step) if self._in_steps else ("start", self.start)
        return f"timeouts.{name}_minutes={limit.total_seconds() / 60:g}"

    def step_ended(self) -> None:
        """The first step is behind us: from now on the short limit holds."""
        if not self._in_steps:
            self._in_steps = True
            set_timeouts(self._step)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While ranks wait for a checkpoint, the slowest rank's disk is what they wait for."""
        set_timeouts(max(self._save, self.start))
        yield
        set_timeouts(self._step if self._in_steps else self.start)
