"""What a start is refused for: found before anything is created, said once, and the same in ``--dry-run``."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist

from beit_dist.checkpoints.layout import committed
from beit_dist.engine.checkpoint.attempts import Attempts
from beit_dist.engine.endpoint import check_address
from beit_dist.engine.memory import in_words, size_of_checkpoint
from beit_dist.engine.metrics import ADDRESS
from beit_dist.engine.ranks.distributed import Agreement, Ranks, store_of_ranks
from beit_dist.engine.ranks.launchers import speaks_for_its_host
from beit_dist.engine.resume import compare_kinds, compare_recipes, progress_of
from beit_dist.engine.run_folder import FAILED, RunFolder
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.engine.task import Task
from beit_dist.errors import ConfigError, SpaceError, UserError

REFUSED = "BEIT_DIST_REFUSED"
"""A file that a refused start leaves, if this variable names one: for what hears of ranks through a launcher."""
_SAID, _HEARD = "beit_dist/refused", "beit_dist/refused/heard"
_PATIENCE = 5.0
_Found = TypeVar("_Found")


class Found(NamedTuple):
    """What a look at the run folder shows, and nothing to refuse."""

    done: str | None
    """What to say where there is nothing left to do."""
    manifest: Mapping[str, Any] | None
    """Of the newest checkpoint; None for a new run."""
    attempt: int
    """Number of the newest start."""

    @property
    def step(self) -> int:
        """Of the newest checkpoint; 0 for a new run."""
        return self.manifest["step"] if self.manifest else 0


class FruitlessError(UserError):
    """Start after start has brought the run no further."""


class RefusedError(UserError):
    """Rank 0 refuses the start, for all ranks.

    Args:
        said: what rank 0 has found.
        code: its exit code.
    """

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.exit_code = code


def on_rank_0(agreement: Agreement, look: Callable[[], _Found]) -> _Found:
    """What rank 0 finds, on all ranks. Collective.

    Raises:
        UserError: what rank 0 found to refuse; on the others a :class:`RefusedError`.
    """
    found: Any = None
    own: UserError | None = None
    if agreement.ranks.rank == 0:
        try:
            found = look()
        except UserError as error:
            own = error
    found, fault = agreement.from_rank_0((found, own and (str(own), own.exit_code)))
    if fault is not None:
        raise own or RefusedError(*fault)
    return cast(_Found, found)


def look(task: Task[Any, Any, Any], run: RunFolder) -> Found:
    """Rank 0's look at the run folder and all else that a start needs, before anything is made.

    Raises:
        UserError: the start is refused.
    """
    if (done := task.finished(run)) is not None:
        return Found(done, None, 0)
    attempt = Attempts(run.checkpoints).newest()
    manifests = (saved.manifest for saved in committed(run.checkpoints) if saved.manifest)
    manifest = next(manifests, None)
    refuse(task, manifest, loud=False)
    refuse_fruitless(task, run, manifest)
    if run.place.is_local:
        check_space(run.path, size_of_checkpoint(task), task.config.checkpoint.keep)
    return Found(None, manifest, attempt)


def refuse(task: Task[Any, Any, Any], manifest: Mapping[str, Any] | None, *, loud: bool) -> None:
    """Refuse what recipe, data set and run folder show together, once :meth:`Task.check` has been called.

    Args:
        manifest: of the checkpoint that would be continued.
        loud: print what differs from it and may.

    Raises:
        CheckpointError: the folder's run is another one.
        ConfigError: the warm-up is longer than the run, a step takes more samples than there are, or the address
            of the metrics is not this host's.
    """
    config, samples = task.config, task.epoch_samples
    if manifest is not None:
        compare(task, manifest, loud=loud)
    if config.global_batch > samples:
        raise ConfigError(
            "global_batch",
            config.global_batch,
            f"at most the {samples:,} images of {config.data}, or a step would see some of them twice",
            "Lower it, or give more images.",
        )
    at = progress_of(task, manifest)
    schedule_of(config, samples, at.first_batch, at.step, at.samples)
    if config.logging.metrics_port is not None:
        check_address(ADDRESS, config.logging.metrics_address)


def refuse_fruitless(task: Task[Any, Any, Any], run: RunFolder, manifest: Mapping[str, Any] | None) -> None:
    """Refuse the next of too many starts that have made no checkpoint, so that no scheduler repeats it for ever.

    A start that was stopped or preempted counts only if it took no step: each other one has left a checkpoint.

    Args:
        manifest: of the checkpoint that would be continued.

    Raises:
        FruitlessError: there were ``max_fruitless_starts`` of them in a row.
    """
    most, at = task.config.max_fruitless_starts, progress_of(task, manifest)
    if most is None or at.step >= steps_of(task.config, task.epoch_samples, at.step, at.samples):
        return
    attempts = Attempts(run.checkpoints)
    if attempts.fruitless(at.step, most) < most:
        return
    newest = attempts.newest()
    raise FruitlessError(
        f"run {task.config.run}: the last starts ({most}: attempts {newest - most + 1} to {newest}) made no "
        f"checkpoint beyond step {at.step}, so this one is refused. Their output, and {FAILED} in the run folder, "
        "say how they ended. Once the cause is gone, start with max_fruitless_starts=null; with the first new "
        "checkpoint the count begins anew."
    )


def compare(task: Task[Any, Any, Any], manifest: Mapping[str, Any], *, loud: bool) -> None:
    """Refuse a checkpoint of another run than the task's; ``loud``: print what differs and may.

    Raises:
        CheckpointError: it is of another kind, or settings differ that must not.
    """
    compare_kinds(task.config.run, task.kind, manifest)
    compare_recipes(task.config, manifest["config"], loud=loud, frozen=task.frozen, shown=task.shown)


def check_space(folder: Path, size: int, keep: int) -> int:
    """Bytes that are free for a run's checkpoints; refuse a start whose checkpoints the disk has no room for.

    Args:
        folder: of the run; it need not be there.
        size: bytes of a checkpoint.
        keep: how many are kept.

    Raises:
        SpaceError: it has not.
    """
    needed, free = size * (keep + 1), free_space(folder)
    if free < needed:
        raise SpaceError(
            f"run: {folder} has {in_words(free)} free, expected {in_words(needed)} for "
            f"{keep} checkpoints and the one being written. Free some, or lower checkpoint.keep."
        )
    return free


def free_space(folder: Path) -> int:
    """Bytes on the disk on which a folder is, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def say_refusal(error: UserError, ranks: Ranks) -> None:
    """Say why nothing was begun: all ranks have found the same, so one of them says it."""
    if error.exit_code == 2 and (path := os.environ.get(REFUSED)):
        with contextlib.suppress(OSError):
            Path(path).touch()
    if isinstance(error, RefusedError):
        return  # rank 0 says it
    said = f"error: {error}"
    if dist.is_initialized() and ranks.rank:
        said = "" if _told(ranks) else f"error: rank {ranks.rank} on {socket.gethostname()}: {error}"
    elif not (dist.is_initialized() or error.of_one_rank or speaks_for_its_host()):
        time.sleep(_PATIENCE / 2)  # launchers end all ranks when the first has failed
        said = ""
    if said:
        print(said, file=sys.stderr, flush=True)
    if dist.is_initialized() and ranks.rank == 0:
        _told(ranks)


def _told(ranks: Ranks) -> bool:
    """Rank 0: tell the others that it has said it, and wait for them. Others: whether it has.

    Where it has not, this rank alone has found it, and waits for nobody.
    """
    store, end = store_of_ranks(), time.monotonic() + _PATIENCE
    with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
        if ranks.rank == 0:
            store.set(_SAID, "1")
        while store.add(_HEARD, 0) < ranks.world - 1 if ranks.rank == 0 else not store.check([_SAID]):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        store.add(_HEARD, 1)
    return True
