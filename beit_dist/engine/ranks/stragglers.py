"""Stragglers: which rank the others wait for.

The time from step to step is the same on all ranks, since they wait for each other in every one. What tells them
apart is the time in which a rank waits for nobody: for its data, and in its forward passes. (At ZeRO stage 3 the
forward gathers weights from the others, so there a straggler shows less.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from beit_dist.engine.metrics import Metrics
from beit_dist.engine.ranks.distributed import Agreement

_log = logging.getLogger(__name__)

RATIO = 1.5
"""Slowest rank over the mean above which a rank is a straggler."""
PATIENCE = 3
"""Intervals in a row for which the same rank must be one before a warning."""
_SHARE = (
    0.05  # of a step's duration that the slowest must cost: 2 ms instead of 1 in a second are nobody's problem
)


class Stragglers:
    """Each rank's own time, compared at the logging interval.

    Args:
        agreement: the ranks' CPU group.
        hosts: host of each rank.
        device: where the model runs; on an accelerator its clock is used, read when it has been waited for anyway.
        metrics: rank 0's metrics; None on the other ranks.
    """

    def __init__(
        self, agreement: Agreement, hosts: Sequence[str], device: torch.device, metrics: Metrics | None
    ) -> None:
        self._agreement, self._hosts, self._metrics = agreement, hosts, metrics
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0
        self._since = time.perf_counter()
        self._suspect, self._intervals = -1, 0

    @contextmanager
    def own_time(self) -> Iterator[None]:
        """What is done inside waits for no other rank."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    @contextmanager
    def others_wait(self) -> Iterator[None]:
        """What is done inside :meth:`own_time` and in here waits for the other ranks after all."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._waits.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds -= time.perf_counter() - began

    def step_ended(self, wait_seconds: float) -> None:
        """Count a step, and how long this rank waited for its data."""
        self._steps += 1
        self._seconds += wait_seconds

    def compare(self) -> None:
        """Compare the ranks over the steps since the last time. Collective; the device was just waited for."""
        steps, self._steps = max(1, self._steps), 0
        own = self._seconds + (_milliseconds(self._events) - _milliseconds(self._waits)) / 1000
        self._seconds, self._events, self._waits = 0.0, [], []
        now = time.perf_counter()
        step_seconds, self._since = (now - self._since) / steps, now
        self._judge([numbers[0] for numbers in self._agreement.gather_numbers([own / steps])], step_seconds)

    def close(self) -> None:
        """Let go of what was not compared."""
        self._events.clear()
        self._waits.clear()

    def _judge(self, seconds: Sequence[float], step_seconds: float) -> None:
        mean, most = sum(seconds) / len(seconds), max(seconds)
        slowest = seconds.index(most)
        ratio = most / mean if mean > 0 else 1.0
        if self._metrics is not None:
            self._metrics.set(
                {
                    "beit_train_step_duration_max_over_mean_ratio": ratio,
                    "beit_train_slowest_rank": slowest,
                    "beit_train_straggler_cost_ratio": min(1.0, (most - mean) / max(step_seconds, 1e-9)),
                }
            )
        if ratio <= RATIO or most - mean < _SHARE * step_seconds:
            self._suspect, self._intervals = -1, 0
            return
        self._intervals = self._intervals + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        if self._intervals == PATIENCE and self._agreement.ranks.rank == 0:
            _log.warning(
                "rank %d on %s holds up the others: %.3f s of its own in a step, %.1f times the mean",
                slowest,
                self._hosts[slowest],
                most,
                ratio,
            )


def _milliseconds(events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    return sum(float(begin.elapsed_time(end)) for begin, end in events)
