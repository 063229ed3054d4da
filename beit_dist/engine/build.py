"""From a resolved recipe to a trainer: data, model, engine, and the newest whole checkpoint, in that order."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from beit_dist.config import TrainConfig
from beit_dist.data.shards import Manifest
from beit_dist.data.stream import RankBatches
from beit_dist.engine.average import WeightAverage
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import AVERAGE, BYTES_OF_AVERAGE, BYTES_OF_STATE, Saved
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.dataset import build_plan, expected_masked, mask_generator
from beit_dist.engine.distributed import Agreement, Ranks
from beit_dist.engine.guard import Guard
from beit_dist.engine.initialisation import initialise_from
from beit_dist.engine.metrics import Metrics
from beit_dist.engine.optimizer import build_optimizer
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.preflight import preflight
from beit_dist.engine.profiling import Profiler
from beit_dist.engine.record import Recorder
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import compare_recipes
from beit_dist.engine.run_folder import RunFolder, versions
from beit_dist.engine.saving import Saving
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.engine.sinks import open_sinks
from beit_dist.engine.step_log import LogSettings
from beit_dist.engine.stragglers import Stragglers
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.trainer import Parts, Progress
from beit_dist.engine.validation import Validation
from beit_dist.engine.watchdog import Watchdog
from beit_dist.errors import SpaceError
from beit_dist.models.flops import flops_per_image
from beit_dist.models.mim import MaskedImageModel


def build(
    config: TrainConfig,
    resolved: Resolved,
    manifest: Manifest,
    ranks: Ranks,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    timeouts: Timeouts,
    held_out: Manifest | None = None,
) -> Parts:
    """Build what a trainer needs and restore the newest whole checkpoint. Collective.

    ``manifest`` is the training data's, ``held_out`` the validation data's, if there is any.

    Raises:
        PreflightError: a rank's host has too little memory, or the ranks' collectives are wrong.
        CheckpointError: the run in the folder has another model, data set, seed or masking.
        SpaceError: the disk has no room for the checkpoints that are kept.
    """
    agreement = Agreement(ranks, timeouts.start)
    run = RunFolder(config.run, config.storage.access)
    if ranks.rank == 0:
        run.create()
    agreement.from_rank_0(None)  # the folder is there before anyone uses it
    store = CheckpointStore(run.checkpoints, config.checkpoint, agreement)
    store.begin_attempt()
    with store.unless_superseded():
        return _build(
            config, resolved, manifest, device, stop, watchdog, timeouts, held_out, agreement, run, store
        )


def _build(
    config: TrainConfig,
    resolved: Resolved,
    manifest: Manifest,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    timeouts: Timeouts,
    held_out: Manifest | None,
    agreement: Agreement,
    run: RunFolder,
    store: CheckpointStore,
) -> Parts:
    ranks = agreement.ranks
    saved = store.newest_whole()
    if saved is not None:
        compare_recipes(config, saved.manifest, loud=ranks.rank == 0)
    trial = preflight(config, resolved, manifest, agreement, device) if config.preflight else None
    plan = build_plan(config, manifest, saved.manifest["plan"] if saved else None)
    masks = mask_generator(config)

    engine = build_engine(config, resolved, device)
    state = EngineState(engine, ranks)
    # At stage 3 a parameter itself is empty; DeepSpeed keeps its shape beside it.
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    average = WeightAverage(state, config.ema.decay) if config.ema.decay is not None else None
    progress = _restore(store, saved, state, config)
    origin: dict[str, Any] | None = saved.manifest.get("init_from") if saved else None
    if saved is None and config.init_from is not None:
        origin = initialise_from(config, shapes, manifest.tokenizer, state, agreement)
    if average is not None and not (saved and AVERAGE in saved.manifest["state_digests"]):
        average.restart()
        if saved and ranks.rank == 0:
            print("ema: the run had no average; it begins with the weights of this checkpoint", flush=True)
    refuse_if_superseded(store, agreement)
    store.prepare(state, device)
    if ranks.rank == 0:
        size = BYTES_OF_STATE + (BYTES_OF_AVERAGE if average else 0)
        if run.place.is_local:
            check_space(run.path, size * parameters, config.checkpoint.keep)
        else:
            print(
                f"lines of numbers grow in {run.path} and are uploaded with each checkpoint",
                flush=True,
            )
        run.take_copies(saved.folder if saved else None)
        run.forget_steps_after(progress.step)
        run.remove_markers()
        run.write_config(config)

    total_steps = steps_of(config, plan.samples)
    metrics = _metrics(config, resolved, progress, total_steps, store) if ranks.rank == 0 else None
    watchdog.metrics = metrics
    port = metrics.serve(config.logging) if metrics else None
    process = {"rank": ranks.rank, "host": socket.gethostname(), "pid": os.getpid()}
    everyone = agreement.gather(process)
    facts = {
        "stage": resolved.stage,
        "precision": resolved.precision,
        "dataset": manifest.digest,
        "tokenizer": manifest.tokenizer,
        "plan": plan.constants(),
        "parameters": shapes,
        "init_from": origin,
        "groups": _group_names(engine),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
    if ranks.rank == 0:
        run.write_run(
            {
                "attempt": store.attempt,
                "started": time.time(),
                "resumed_from": saved.folder.name if saved else None,
                "init_from": origin,
                "world_size": ranks.world,
                "stage": resolved.stage,
                "precision": resolved.precision,
                "dataset": manifest.digest,
                "metrics_port": port,
                "preflight": trial,
                "versions": facts["versions"],
                "ranks": everyone,
            }
        )
    recorder = Recorder(
        run,
        metrics,
        LogSettings(
            every=config.logging.every_steps,
            attempt=store.attempt,
            total_steps=total_steps,
            batch=config.global_batch,
            progress=config.logging.progress,
        ),
        flops_per_sample=flops_per_image(config.model, expected_masked(config.model, masks)),
        sinks=open_sinks(config, run.path, progress.step) if ranks.rank == 0 else None,
        validates=held_out is not None,
    )
    guard = Guard(
        config.guard,
        agreement,
        engine.module,
        whole=resolved.stage < 3,
        metrics=metrics,
        saved=saved.manifest.get("guard") if saved else None,
    )
    recorder.listeners.append(guard.fetched)
    return Parts(
        config=config,
        resolved=resolved,
        engine=engine,
        device=device,
        plan=plan,
        schedule=schedule_of(config, plan.samples, progress.first_batch),
        total_steps=total_steps,
        batches=RankBatches(
            root=str(config.data),
            manifest=manifest,
            plan=plan,
            masks=masks,
            drop_path_rates=config.model.drop_path_rates,
            global_batch=config.global_batch,
            rank=ranks.rank,
            world=ranks.world,
            consumed=progress.consumed,
            loader=config.loader,
            pin=device.type == "cuda",
            ranks_on_node=sum(other["host"] == process["host"] for other in everyone),
            access=config.storage.access,
        ),
        agreement=agreement,
        store=store,
        saving=Saving(store, state, config.checkpoint, agreement, timeouts, watchdog, metrics),
        average=average,
        validation=None
        if held_out is None
        else Validation(config, held_out, masks, resolved.micro_batch, agreement, device),
        recorder=recorder,
        guard=guard,
        stragglers=Stragglers(agreement, [other["host"] for other in everyone], device, metrics),
        profiler=Profiler(config.profile, run.path / "ranks", ranks.rank),
        watchdog=watchdog,
        timeouts=timeouts,
        metrics=metrics,
        run=run,
        stop=stop,
        progress=progress,
        facts=facts,
    )


def build_engine(config: TrainConfig, resolved: Resolved, device: torch.device) -> Any:
    """The model, its optimizer, and DeepSpeed's engine around both."""
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model = MaskedImageModel(config.model, recompute=config.activation_checkpointing)
    model.initialise(config.seed)
    if config.compile:
        model.compile_blocks()
    optimizer = build_optimizer(
        model.parameter_groups(config.optimizer.weight_decay),
        config.optimizer,
        guarded=resolved.stage == 0 and resolved.precision == "fp32",
        fused=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory figures that nothing turns off
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=resolved.deepspeed, dist_init_required=False
        )
    engine.train()
    return engine


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


def _restore(store: CheckpointStore, saved: Saved | None, state: EngineState, config: TrainConfig) -> Progress:
    if saved is None:
        return Progress(first_batch=config.global_batch)
    store.restore(saved, state)
    position = saved.manifest["position"]
    if store.rank == 0:
        print(f"resumed from {saved.folder.name}: step {saved.step}, {position['samples']} samples", flush=True)
        if config.init_from is not None:
            print("init_from is ignored: the run has weights of its own", flush=True)
    return Progress(
        step=saved.step,
        consumed=position["consumed"],
        samples=position["samples"],
        first_batch=position["first_batch"],
        counters=dict(saved.manifest["counters"]),
    )


def _metrics(
    config: TrainConfig, resolved: Resolved, progress: Progress, total_steps: int, store: CheckpointStore
) -> Metrics:
    """Rank 0's metrics, with the counters where the run left them."""
    metrics = Metrics()
    named = {name: str(value) for name, value in versions().items() if name != "commit"}
    metrics.describe(
        **named, zero_stage=str(resolved.stage), precision=resolved.precision, run=Path(config.run).name
    )
    metrics.add("beit_train_steps", progress.step)
    metrics.add("beit_train_steps_skipped", progress.counters["skipped"])
    metrics.add("beit_train_samples", progress.samples)
    metrics.add("beit_train_masked_patches", progress.counters["masked"])
    metrics.add("beit_data_bad_samples", progress.counters["bad"])
    metrics.add("beit_checkpoint_damaged", store.passed_over)
    metrics.set({"beit_train_target_steps": total_steps, "beit_train_world_size": resolved.ranks})
    return metrics


def _group_names(engine: Any) -> list[dict[str, Any]]:
    """The optimizer's groups by name, with their weight decay."""
    return [
        {"name": group["name"], "weight_decay": group["weight_decay"]} for group in engine.optimizer.param_groups
    ]


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
