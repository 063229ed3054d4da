"""One start of a run on one rank: join, build, train, and leave a marker that says how it ended."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
import warnings
from datetime import timedelta
from typing import NoReturn

from beit_dist.config import TrainConfig
from beit_dist.data.shards import Manifest
from beit_dist.engine.build import build
from beit_dist.engine.checkpoint.store import SupersededError
from beit_dist.engine.dataset import open_data, open_validation
from beit_dist.engine.distributed import (
    Ranks,
    check_precision,
    close_process_groups,
    init_process_groups,
    store_of_ranks,
)
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.run_folder import DONE, FAILED, RunFolder
from beit_dist.engine.sinks import check_packages
from beit_dist.engine.trainer import Trainer
from beit_dist.errors import TrainingError, UserError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another in a collective before it gives up."""


def launch(config: TrainConfig, resolved: Resolved, ranks: Ranks) -> int:
    """Train on this rank; 0 when the run is done, or was stopped on request with a whole checkpoint.

    What every rank would find wrong alike is raised before the ranks join. After that a failure ends this
    process at once, without further collectives: others may be stuck in one, and follow when they notice.
    """
    _quieten()
    check_precision(resolved.precision)
    manifest = open_data(config, check_files=ranks.local_rank == 0)
    check_packages(config)
    held_out = open_validation(config, manifest, check_files=ranks.local_rank == 0)
    # A signal during the start is a stop before the first step. Of max_minutes rank 0's clock alone decides.
    stop = StopRequest(max_minutes=config.max_minutes if ranks.rank == 0 else None).install()
    try:
        _train(config, resolved, ranks, (manifest, held_out), stop)
    except SupersededError as error:  # the folder belongs to the newer attempt: leave no marker in it
        _end(f"rank {ranks.rank} on {socket.gethostname()}: {error}", error.exit_code)
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()
        if config.run:
            details = {"details": error.details} if isinstance(error, TrainingError) and error.details else {}
            RunFolder(config.run).mark(FAILED, rank=ranks.rank, exit_code=code, error=text, **details)
        _end(f"error: rank {ranks.rank} on {socket.gethostname()}: {text}", code)
    return 0


def _train(
    config: TrainConfig,
    resolved: Resolved,
    ranks: Ranks,
    data: tuple[Manifest, Manifest | None],
    stop: StopRequest,
) -> None:
    device = init_process_groups(ranks, TIMEOUT)
    stop.share(store_of_ranks())
    manifest, held_out = data
    parts = build(config, resolved, manifest, ranks, device, stop, TIMEOUT, held_out)
    try:
        first_step = parts.progress.step
        trainer = Trainer(parts)
        marker = trainer.run()
        if ranks.rank == 0:
            step, total = parts.progress.step, parts.total_steps
            RunFolder(config.run).mark(marker, attempt=parts.store.attempt, step=step, reason=trainer.reason)
            nothing_left = marker == DONE and first_step >= total
            ended = "nothing left to do" if nothing_left else "done" if marker == DONE else "stopped on request"
            print(f"\n{ended}: step {step} of {total}, run folder {config.run}", flush=True)
    finally:
        parts.close()
    close_process_groups()


def _quieten() -> None:
    """Silence what a user can do nothing about: DeepSpeed's log of its start, and uses of old torch names."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)  # torchdata 0.11
    warnings.filterwarnings("ignore", message=".*is deprecated.*", module="torch.distributed.*")  # DeepSpeed 0.19


def _end(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
