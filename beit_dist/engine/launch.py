"""One start of a run on one rank: join, build, train, and leave a marker that says how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from typing import NoReturn

from deepspeed.accelerator import get_accelerator

from beit_dist.config import TrainConfig
from beit_dist.data.shards import Manifest
from beit_dist.engine.build import build
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.compiled import check_compiler
from beit_dist.engine.dataset import open_data, open_validation
from beit_dist.engine.distributed import Ranks
from beit_dist.engine.failure import Failure
from beit_dist.engine.output import go_on_unread
from beit_dist.engine.precision import check_precision
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.process import Process, join
from beit_dist.engine.rendezvous import meeting_point
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import DONE, RunFolder
from beit_dist.engine.sinks import check_packages
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.trainer import Trainer
from beit_dist.storage.place import is_url


def launch(config: TrainConfig, resolved: Resolved, ranks: Ranks) -> int:
    """Train on this rank; 0 when the run is done, or was stopped on request with a whole checkpoint.

    What every rank would find wrong alike is raised before the ranks join. After that a failure ends this
    process at once, without further collectives: others may be stuck in one, and follow when they notice.
    """
    since = time.time()
    quieten()
    go_on_unread()
    meeting = meeting_point(ranks)
    check_precision(resolved.precision)
    manifest = open_data(config, check_files=_checks(config.data, ranks))
    check_packages(config)
    if config.compile:
        check_compiler(get_accelerator().device_name())
    held_out = open_validation(config, manifest, check_files=_checks(config.validation.data, ranks))
    run = RunFolder(config.run, config.storage.access)
    run.check_writable()
    # A signal during the start is a stop before the first step. Of max_minutes rank 0's clock alone decides.
    stop = StopRequest(max_minutes=config.max_minutes if ranks.rank == 0 else None).install()
    timeouts = Timeouts(config.timeouts, config.checkpoint.timeout_seconds)
    with failures_marked(run, ranks, timeouts, since):
        process = join(config, run, ranks, meeting, stop, timeouts)
        _train(config, resolved, run, process, manifest, held_out)
        process.leave()
    return 0


@contextlib.contextmanager
def failures_marked(run: RunFolder, ranks: Ranks, timeouts: Timeouts, since: float) -> Iterator[None]:
    """End this process at once at whatever is raised inside, with a marker in the run folder.

    Args:
        since: Unix time at which this start began.
    """
    try:
        yield
    except SupersededError as error:  # the folder belongs to the newer attempt: leave no marker in it
        _end(f"rank {ranks.rank} on {socket.gethostname()}: {error}", error.exit_code)
    except BaseException as error:
        failure = Failure(error, ranks, timeouts.now)
        _end(failure.report(run, since), failure.exit_code)


def _train(
    config: TrainConfig,
    resolved: Resolved,
    run: RunFolder,
    process: Process,
    manifest: Manifest,
    held_out: Manifest | None,
) -> None:
    parts = build(config, resolved, manifest, held_out, process)
    first_step = parts.progress.step
    trainer = Trainer(parts)
    with parts.store.unless_superseded():
        marker = trainer.run()
        if process.ranks.rank == 0:
            parts.store.refuse_if_superseded()
    if process.ranks.rank == 0:
        step, total = parts.progress.step, parts.total_steps
        run.mark(marker, attempt=parts.store.attempt, step=step, reason=trainer.reason)
        nothing_left = marker == DONE and first_step >= total
        ended = "nothing left to do" if nothing_left else "done" if marker == DONE else "stopped on request"
        print(f"\n{ended}: step {step} of {total}, run folder {config.run}", flush=True)
    parts.close()  # not after a failure: the others shall not wait for this rank's loader to end


def _checks(where: str | None, ranks: Ranks) -> bool:
    """Whether this rank looks for the shards: one on each host in a folder, which may be the host's own."""
    return (ranks.rank if where and is_url(where) else ranks.local_rank) == 0


def quieten() -> None:
    """Silence what a user can do nothing about: DeepSpeed's log of its start, and uses of old torch names.

    And what is said beside the message of a rank that fails: it ends at once, and leaves its loader's semaphores
    to Python's tracker, a process of its own, to remove.
    """
    own = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [own, "ignore:resource_tracker:UserWarning"]))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)  # torchdata 0.11
    warnings.filterwarnings("ignore", message=".*is deprecated.*", module="torch.distributed.*")  # DeepSpeed 0.19


def _end(message: str, code: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
