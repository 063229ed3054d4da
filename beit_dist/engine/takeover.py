"""A start makes a run's folder its own: the attempt, what is left from earlier ones, space, and ``run.json``."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import torch

from beit_dist.checkpoints.layout import Saved
from beit_dist.config.run import RunConfig
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.engine.run_folder import RunFolder


def open_run(config: RunConfig, run: RunFolder, agreement: Agreement, seen: int, step: int) -> CheckpointStore:
    """Make a run folder this start's own: from here on it has a number, and leaves a marker. Collective.

    The markers of earlier starts go: should this one fail, ``FAILED`` must not lie beside another.

    Args:
        seen: number of the newest start when this one looked at the folder.
        step: of the newest checkpoint then; 0 if there was none.

    Raises:
        SupersededError: another start was quicker.
    """
    run.begun = True
    if agreement.ranks.rank == 0:
        run.create()
    agreement.from_rank_0(None)  # the folder is there before anyone uses it
    store = CheckpointStore(run.checkpoints, config.checkpoint, agreement)
    run.attempt = store.begin_attempt(seen, step)
    if agreement.ranks.rank == 0:
        run.remove_markers()
    return store


def take_over(
    config: RunConfig,
    run: RunFolder,
    store: CheckpointStore,
    agreement: Agreement,
    state: EngineState,
    saved: Saved | None,
    device: torch.device,
) -> None:
    """Make the folder this start's own: its files now say where ``saved`` has left the run. Collective.

    Args:
        saved: the checkpoint that was restored; None for a new run.
        device: where the state lies.

    Raises:
        SupersededError: a newer start was quicker.
    """
    refuse_if_superseded(store, agreement)
    store.prepare(state, device)
    if agreement.ranks.rank != 0:
        return
    if not run.place.is_local:
        print(f"lines of numbers grow in {run.path} and are uploaded with each checkpoint", flush=True)
    run.take_copies(saved.folder if saved else None)
    run.forget_steps_after(saved.step if saved else 0)
    run.write_config(config)


def introduce(
    run: RunFolder,
    store: CheckpointStore,
    agreement: Agreement,
    saved: Saved | None,
    metrics_port: int | None,
    facts: Mapping[str, Any],
) -> list[str]:
    """Write ``run.json``: who runs, on what, from where. Collective.

    Args:
        saved: the checkpoint that was restored; None for a new run.
        metrics_port: of rank 0's endpoint.
        facts: what it says besides.

    Returns:
        The host of each rank.
    """
    ranks = agreement.ranks
    everyone = agreement.gather({"rank": ranks.rank, "host": socket.gethostname(), "pid": os.getpid()})
    if ranks.rank == 0:
        run.write_run(
            {
                "attempt": store.attempt,
                "started": time.time(),
                "resumed_from": saved.folder.name if saved else None,
                "world_size": ranks.world,
                "metrics_port": metrics_port,
                "ranks": everyone,
                **facts,
            }
        )
    return [other["host"] for other in everyone]


def refuse_if_superseded(store: CheckpointStore, agreement: Agreement) -> None:
    """Of two starts at once the older may be the slower one: what it is about to write is the newer one's now."""
    said = ""
    if store.rank == 0:
        try:
            store.refuse_if_superseded()
        except SupersededError as error:
            said = str(error)
    if said := agreement.from_rank_0(said):
        raise SupersededError(said)
