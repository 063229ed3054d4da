"""One start of a run on one rank: join, build, train, and leave a marker that says how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from deepspeed.accelerator import get_accelerator

from beit_dist.engine.checkpoint.attempts import Attempts, SupersededError
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.compiled import check_compiler
from beit_dist.engine.conclusion import conclusion
from beit_dist.engine.failure import Failure
from beit_dist.engine.memory import parameter_shapes
from beit_dist.engine.optimizers.table import check_model
from beit_dist.engine.output import go_on_unread
from beit_dist.engine.precision import check_precision
from beit_dist.engine.process import Process, join
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.preemption import MAX_MINUTES, StopRequest
from beit_dist.engine.ranks.rendezvous import Meeting, meeting_point
from beit_dist.engine.ranks.timeouts import Timeouts
from beit_dist.engine.refusal import look, on_rank_0, say_refusal
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import DONE, PREEMPTED, RunFolder
from beit_dist.engine.sinks import check_packages
from beit_dist.engine.start import Prepared, prepare, start
from beit_dist.engine.takeover import open_run, refuse_if_superseded
from beit_dist.engine.task import StartStopped, Task
from beit_dist.errors import UserError

_AND_NOW = "run folder {}. To continue, give the same command again."


def launch(task: Task[Any, Any, Any], resolved: Resolved, ranks: Ranks) -> int:
    """Train on this rank; 0 when the run is done, or was stopped on request with a whole checkpoint.

    What every rank would find wrong alike is raised before the ranks join. After that a failure ends this
    process at once, without further collectives: others may be stuck in one, and follow when they notice.
    """
    since, config = time.time(), task.config
    quieten()
    go_on_unread()
    meeting = check_alike(task, resolved, ranks)
    run = RunFolder(config.run, config.storage.access)
    run.check_writable()
    # A signal during the start is a stop before the first step. Of max_minutes rank 0's clock alone decides.
    stop = StopRequest(ranks.rank, max_minutes=config.max_minutes if ranks.rank == 0 else None).install()
    timeouts = Timeouts(config.timeouts, config.checkpoint.timeout_seconds)
    with failures_marked(run, ranks, timeouts, since):
        process = join(config, run, ranks, meeting, stop, timeouts)
        train(task, resolved, run, process)
        process.leave()
    return 0


def check_alike(task: Task[Any, Any, Any], resolved: Resolved, ranks: Ranks) -> Meeting | None:
    """Refuse what every rank would find wrong alike, before they join; where they meet.

    Raises:
        UserError: a setting, or the data, is wrong.
    """
    config, accelerator, meeting = task.config, get_accelerator(), meeting_point(ranks)
    check_precision(resolved.precision)
    check_packages(config)
    if config.compile:
        check_compiler(accelerator.device_name())
    if task.paths is not None:
        task.paths.check(accelerator.device_name())
    if ranks.world == 1 and accelerator.device_name() != "cpu" and (count := accelerator.device_count()) > 1:
        print(f"1 of the {count} GPUs here is used; --ranks {count} uses all of them", flush=True)
    check_model(config.optimizer, parameter_shapes(task))
    task.check(ranks)
    return meeting


def train(task: Task[Any, Any, Any], resolved: Resolved, run: RunFolder, process: Process) -> str:
    """Train from where the run is; the marker that was left. Collective."""
    agreement, loud = process.agreement, process.ranks.rank == 0
    found = on_rank_0(agreement, lambda: look(task, run))
    if found.done is not None:
        if loud:
            print(f"already done: {found.done}, run folder {task.config.run}", flush=True)
        return DONE
    prepared: Prepared | None = None
    with contextlib.suppress(StartStopped):
        prepared = prepare(task, resolved, process, found.manifest)
    store = open_run(task.config, run, agreement, found.attempt, found.step)
    process.watchdog.open()
    with store.unless_superseded():
        if prepared is not None:
            with contextlib.suppress(StartStopped):
                return _train(task, prepared, run, store, process)
        return _stopped_early(task, run, store, process, found.manifest)


def _stopped_early(
    task: Task[Any, Any, Any],
    run: RunFolder,
    store: CheckpointStore,
    process: Process,
    manifest: Mapping[str, Any] | None,
) -> str:
    refuse_if_superseded(store, process.agreement)  # then the marker is the newer one's to leave
    asked = [name for name in process.agreement.gather(process.stop.name) if name]
    if process.ranks.rank == 0:
        step, reason = manifest["step"] if manifest else 0, next(iter(asked), MAX_MINUTES)
        run.mark(PREEMPTED, kind=task.kind, attempt=store.attempt, step=step, reason=reason)
        now = _AND_NOW.format(task.config.run)
        print(f"stopped on request, before the first step of this start: step {step}, {now}", flush=True)
    return PREEMPTED


def _train(
    task: Task[Any, Any, Any], prepared: Prepared, run: RunFolder, store: CheckpointStore, process: Process
) -> str:
    loud, began = process.ranks.rank == 0, time.monotonic()
    trainer = start(task, prepared, process, run, store)
    first_step = trainer.progress.step
    marker = trainer.run()
    if loud:
        store.refuse_if_superseded()
    facts = task.conclude() if marker == DONE else {"reason": trainer.reason}
    step, total = trainer.progress.step, trainer.total_steps
    if loud:
        run.mark(marker, kind=task.kind, attempt=store.attempt, step=step, **facts)
        trainer.watchers.recorder.end_progress()
        if marker == DONE and first_step >= total:
            print(f"nothing left to do: step {step} of {total}, run folder {task.config.run}", flush=True)
        elif marker == DONE:
            seconds = time.monotonic() - began
            print(conclusion(task, run, (step, total), seconds, trainer.watchers.recorder.baselines), flush=True)
        else:
            now = _AND_NOW.format(task.config.run)
            print(f"stopped on request: step {step} of {total}, checkpoint saved, {now}", flush=True)
    # not after a failure: the others shall not wait for this rank's loader to end
    task.close()
    trainer.watchers.close()
    return marker


@contextlib.contextmanager
def failures_marked(run: RunFolder, ranks: Ranks, timeouts: Timeouts, since: float) -> Iterator[None]:
    """End this process at once at whatever is raised inside, with a marker in the run folder if it has begun.

    Args:
        since: Unix time at which this start began.
    """
    try:
        yield
    except SupersededError as error:  # the folder belongs to the newer attempt: leave no marker in it
        _end(f"rank {ranks.rank} on {socket.gethostname()}: {error}", error.exit_code)
    except BaseException as error:
        failure = Failure(error, ranks, timeouts.now)
        if superseded := _superseded(run):  # as on a host that was cut off: its peers are gone for a good reason
            _end(f"rank {ranks.rank} on {socket.gethostname()}: {superseded}", SupersededError.exit_code)
        if run.begun:
            _end(failure.report(run, since), failure.exit_code)
        if isinstance(error, UserError):
            say_refusal(error, ranks)
            _end("", error.exit_code)
        _end(failure.said, failure.exit_code)


def _superseded(run: RunFolder) -> str:
    """What says that the run folder is a newer start's, if it is."""
    with contextlib.suppress(OSError, UserError):
        newest = Attempts(run.checkpoints).newest()
        if 0 < run.attempt < newest:
            return f"superseded by attempt {newest}: this run (attempt {run.attempt}) stops"
    return ""


def quieten() -> None:
    """Silence what a user can do nothing about: DeepSpeed's log of its start, and uses of old torch names.

    And what is said beside the message of a rank that fails: it ends at once, and leaves its loader's semaphores
    to Python's tracker, a process of its own, to remove.
    """
    own = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [own, "ignore:resource_tracker:UserWarning"]))
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.WARNING)
    deepspeed_log.addFilter(lambda record: "untested optimizer" not in str(record.msg))  # ours have tests
    warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)  # torchdata 0.11
    warnings.filterwarnings("ignore", message=".*is deprecated.*", module="torch.distributed.*")  # DeepSpeed 0.19


def _end(message: str, code: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
