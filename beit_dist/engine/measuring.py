"""``--dry-run --measure``: how long a run will take, from some of its steps, taken here and thrown away.

The steps are the run's own: its trainer, ranks, loader, ZeRO stage and precision. Only the run folder is another
one, a temporary folder of each rank, which is removed whatever happens.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from deepspeed.accelerator import get_accelerator

from beit_dist.config.run import ProfileConfig, RunConfig
from beit_dist.engine.durations import duration
from beit_dist.engine.launch import check_alike, failures_marked, quieten
from beit_dist.engine.process import Process, join
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.preemption import STOP_SIGNALS, StopRequest
from beit_dist.engine.ranks.timeouts import Timeouts
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.start import prepare, start
from beit_dist.engine.takeover import open_run
from beit_dist.engine.task import Described, Task
from beit_dist.engine.trainer import Trainer

ConfigT = TypeVar("ConfigT", bound=RunConfig)

LEFT_OUT = 3
"""Steps before the first that is timed: they compile, allocate, and find a loader that has read ahead."""
_SECONDS = 15.0
"""How long steps are timed ..."""
_LEAST = 3
"""... and the least number of timings, where steps are so slow that they take longer."""
_TIMING = 1.0
"""Seconds that a timing should cover; between two of them the ranks wait for the device, as a run does not."""


@dataclass(frozen=True)
class Timing:
    """How long steps took.

    Args:
        seconds: of a step, one for each timing.
        steps: of each timing.
        waited: the share of all of them in which rank 0 waited for data.
    """

    seconds: tuple[float, ...]
    steps: tuple[int, ...]
    waited: float

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def rows(self, batch: int, total: int, left: int) -> Described:
        """What was measured, and what follows for the run.

        Args:
            batch: samples of a step.
            total: steps of the run.
            left: of these, how many were not taken yet.
        """
        low, high = min(self.seconds), max(self.seconds)
        yield (
            "measured",
            f"{self.median:.3g} s a step ({low:.3g} to {high:.3g} in {len(self.seconds)} timings of "
            f"{sum(self.steps)} steps), {batch / self.median:.3g} images/s, data wait {self.waited:.1%}",
        )
        rest = f"; about {duration(left * self.median)} for the {left:,} that are left" if left < total else ""
        yield (
            "duration",
            f"about {duration(total * self.median)} for all {total:,} steps{rest}, without checkpoints and "
            "measurements on held-out images",
        )


def measure(task: Task[Any, Any, Any], resolved: Resolved, ranks: Ranks) -> Timing:
    """Take some steps of a run and throw them away. Collective.

    A failure ends this process, as in a start, and so does a stop signal. Neither leaves anything behind.

    Args:
        task: of the run.
        resolved: for the ranks that were started.
        ranks: this process among all.
    """
    since, config = time.time(), task.config
    timeouts = Timeouts(config.timeouts, config.checkpoint.timeout_seconds)
    quieten()
    temporary = tempfile.TemporaryDirectory(prefix="beit_dist-measure-", ignore_cleanup_errors=True)
    run = RunFolder(temporary.name)
    with failures_marked(run, ranks, timeouts, since), _ending_at_signals(ranks), temporary:
        task.config = _thrown_away(config, temporary.name)
        meeting = check_alike(task, resolved, ranks)
        process = join(task.config, run, ranks, meeting, StopRequest(ranks.rank), timeouts)
        timing = _on_this_rank(task, resolved, process, run)
        process.leave()
    task.config = config
    return timing


def _thrown_away(config: ConfigT, folder: str) -> ConfigT:
    """The recipe of a run that nobody looks at, with the same steps."""
    silent = {"metrics_port": None, "progress": False, "tensorboard": False, "wandb": None}
    logging = config.logging.model_copy(update=silent)
    others = {"init_from": None, "max_minutes": None, "profile": ProfileConfig()}
    return config.model_copy(update={"run": folder, "logging": logging, **others})


def _on_this_rank(task: Task[Any, Any, Any], resolved: Resolved, process: Process, run: RunFolder) -> Timing:
    with contextlib.redirect_stdout(io.StringIO()):  # what a start says was said by --dry-run already
        prepared = prepare(task, resolved, process, None)
        store = open_run(task.config, run, process.agreement, 0, 0)
        trainer = start(task, prepared, process, run, store, saves=False)
    timing = _time(trainer, process)
    task.close()
    trainer.watchers.close()
    return timing


def _time(trainer: Trainer, process: Process) -> Timing:
    wait = get_accelerator().synchronize
    steps = trainer.steps()
    _take(steps, LEFT_OUT)
    wait()
    began, size, waited = time.perf_counter(), 1, 0.0
    seconds: list[float] = []
    sizes: list[int] = []
    while size:
        since = time.perf_counter()
        waited += _take(steps, size)
        wait()
        now = time.perf_counter()
        seconds.append((now - since) / size)
        sizes.append(size)
        enough = len(seconds) >= _LEAST and now - began >= _SECONDS
        size = process.agreement.from_rank_0(0 if enough else max(1, round(_TIMING / seconds[-1])))
    process.agreement.result()  # of a batch that is not trained on any more
    return Timing(tuple(seconds), tuple(sizes), waited / (now - began))


def _take(steps: Iterator[float], number: int) -> float:
    return sum(next(steps) for _ in range(number))


@contextlib.contextmanager
def _ending_at_signals(ranks: Ranks) -> Iterator[None]:
    """End the process at a stop signal, once the contexts inside this one have cleaned up."""
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if ranks.rank == 0:
            print("stopped while measuring; nothing was kept", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # not by way of the loader's and DeepSpeed's own ends: others may be gone
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one must not cut the cleaning up short
    raise KeyboardInterrupt
