"""What both loops do when a run starts: its folder, the attempt, the engine, metrics, and ``run.json``."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from beit_dist.config import TrainConfig
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import Saved, committed
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.distributed import Agreement
from beit_dist.engine.metrics import METRICS, Metric, Metrics
from beit_dist.engine.optimizer import guard_updates
from beit_dist.engine.resolve import AUTO, Resolved
from beit_dist.engine.resume import FROZEN, compare_recipes
from beit_dist.engine.run_folder import RunFolder, versions
from beit_dist.errors import CheckpointError, SpaceError
from beit_dist.tokenizer_config import TokenizerRecipe

Recipe = TrainConfig | TokenizerRecipe


def open_run(
    recipe: Recipe, agreement: Agreement, frozen: Collection[str] = FROZEN
) -> tuple[RunFolder, CheckpointStore]:
    """The run folder, made if need be, and its checkpoints; this start has its number then. Collective.

    The recipe of another run is refused before it takes a number, which would end a start that is under way. The
    markers of earlier starts go at once: should this one fail, ``FAILED`` must not lie beside another.

    Args:
        frozen: settings that must be as the newest checkpoint has them.

    Raises:
        CheckpointError: they are not.
    """
    run = RunFolder(str(recipe.run), recipe.storage.access)
    said = ""
    if agreement.ranks.rank == 0:
        run.create()
        try:
            readable = (saved.manifest for saved in committed(run.checkpoints) if saved.manifest)
            if newest := next(readable, None):
                compare_recipes(recipe, newest, loud=False, frozen=frozen)
        except CheckpointError as error:
            said = str(error)
            run.remove_markers()
    if said := agreement.from_rank_0(said):  # the folder is there before anyone uses it
        raise CheckpointError(said)
    store = CheckpointStore(run.checkpoints, recipe.checkpoint, agreement)
    store.begin_attempt()
    if agreement.ranks.rank == 0:
        run.remove_markers()
    return run, store


def initialize_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, resolved: Resolved) -> Any:
    """DeepSpeed's engine around a model and its optimizer, ready to train and guarded."""
    if resolved.precision == AUTO:
        raise ValueError("the precision is not settled, and DeepSpeed takes auto for fp32")
    settings = resolved.deepspeed
    if resolved.optimizer_is_bare:
        guard_updates(optimizer, settings["gradient_clipping"])
        settings = settings | {"gradient_clipping": 0.0}  # DeepSpeed would clip without a look at the norm
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory figures that nothing turns off
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    engine.train()
    return engine


def take_over(
    recipe: Recipe,
    run: RunFolder,
    store: CheckpointStore,
    agreement: Agreement,
    state: EngineState,
    saved: Saved | None,
    size: int,
    device: torch.device,
) -> None:
    """Make the folder this start's own: its files now say where ``saved`` has left the run. Collective.

    Args:
        saved: the checkpoint that was restored; None for a new run.
        size: bytes of a checkpoint.
        device: where the state lies.

    Raises:
        SupersededError: a newer start was quicker.
        SpaceError: the disk has no room for the checkpoints that are kept.
    """
    refuse_if_superseded(store, agreement)
    store.prepare(state, device)
    if agreement.ranks.rank != 0:
        return
    if run.place.is_local:
        check_space(run.path, size, recipe.checkpoint.keep)
    else:
        print(f"lines of numbers grow in {run.path} and are uploaded with each checkpoint", flush=True)
    run.take_copies(saved.folder if saved else None)
    run.forget_steps_after(saved.step if saved else 0)
    run.write_config(recipe)


def check_space(folder: Path, size: int, keep: int) -> None:
    """Refuse a start whose checkpoints the disk has no room for.

    Args:
        size: bytes of a checkpoint.
        keep: how many are kept.

    Raises:
        SpaceError: it has not.
    """
    needed = size * (keep + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SpaceError(
            f"run: {folder} has {free / 2**30:.1f} GiB free, expected {needed / 2**30:.1f} GiB for "
            f"{keep} checkpoints and the one being written. Free some, or lower checkpoint.keep."
        )


def open_metrics(
    recipe: Recipe,
    resolved: Resolved,
    store: CheckpointStore,
    *,
    steps: int,
    skipped: int,
    samples: int,
    total_steps: int,
    table: Sequence[Metric] = METRICS,
) -> Metrics:
    """Rank 0's metrics, with the counters where the run left them."""
    metrics = Metrics(table)
    named = {name: str(value) for name, value in versions().items() if name != "commit"}
    metrics.describe(
        **named, zero_stage=str(resolved.stage), precision=resolved.precision, run=Path(str(recipe.run)).name
    )
    metrics.add("beit_train_steps", steps)
    metrics.add("beit_train_steps_skipped", skipped)
    metrics.add("beit_train_samples", samples)
    metrics.add("beit_checkpoint_damaged", store.passed_over)
    metrics.set({"beit_train_target_steps": total_steps, "beit_train_world_size": resolved.ranks})
    return metrics


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
