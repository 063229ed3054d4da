"""From a resolved recipe to a trainer: data, model, engine, and the newest whole checkpoint, in that order."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from beit_dist.config import TrainConfig
from beit_dist.data.shards import Manifest
from beit_dist.data.stream import RankBatches
from beit_dist.engine.average import WeightAverage
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import AVERAGE, Saved, checkpoint_bytes
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.compiled import CompiledBlocks
from beit_dist.engine.dataset import build_plan, expected_masked, mask_generator
from beit_dist.engine.guard import Guard
from beit_dist.engine.initialisation import initialise_from
from beit_dist.engine.optimizer import build_optimizer
from beit_dist.engine.precision import settle
from beit_dist.engine.preflight import preflight
from beit_dist.engine.process import Process
from beit_dist.engine.profiling import Profiler
from beit_dist.engine.record import Recorder
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.resume import compare_recipes
from beit_dist.engine.run_folder import RunFolder, versions
from beit_dist.engine.saving import Saving
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.engine.sinks import open_sinks
from beit_dist.engine.start import initialize_engine, introduce, open_metrics, open_run, take_over
from beit_dist.engine.step_log import LogSettings
from beit_dist.engine.stragglers import Stragglers
from beit_dist.engine.trainer import Parts, Progress
from beit_dist.engine.validation import Validation
from beit_dist.models.flops import flops_per_image
from beit_dist.models.mim import MaskedImageModel


def build(
    config: TrainConfig, resolved: Resolved, manifest: Manifest, held_out: Manifest | None, process: Process
) -> Parts:
    """Build what a trainer needs and restore the newest whole checkpoint. Collective.

    ``manifest`` is the training data's, ``held_out`` the validation data's, if there is any.

    Raises:
        PreflightError: a rank's host has too little memory, or the ranks' collectives are wrong.
        CheckpointError: the run in the folder has another model, data set, seed or masking.
        SpaceError: the disk has no room for the checkpoints that are kept.
    """
    run, store = open_run(config, process.agreement)
    with store.unless_superseded():
        return _build(config, resolved, manifest, held_out, process, run, store)


def _build(
    config: TrainConfig,
    resolved: Resolved,
    manifest: Manifest,
    held_out: Manifest | None,
    process: Process,
    run: RunFolder,
    store: CheckpointStore,
) -> Parts:
    agreement, device = process.agreement, process.device
    ranks = agreement.ranks
    saved = store.newest_whole()
    if saved is not None:
        compare_recipes(config, saved.manifest, loud=ranks.rank == 0)
    resolved = settle(resolved, saved.manifest["precision"] if saved else None, agreement, device)
    plan = build_plan(config, manifest, saved.manifest["plan"] if saved else None)
    trial = preflight(config, resolved, manifest, plan, agreement, device) if config.preflight else None
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
    size = checkpoint_bytes(parameters, average is not None)
    take_over(config, run, store, agreement, state, saved, size, device)

    total_steps = steps_of(config, plan.samples, progress.step, progress.samples)
    metrics = None
    if ranks.rank == 0:
        metrics = open_metrics(
            config,
            resolved,
            store,
            steps=progress.step,
            skipped=progress.counters["skipped"],
            samples=progress.samples,
            total_steps=total_steps,
        )
        metrics.add("beit_train_masked_patches", progress.counters["masked"])
        metrics.add("beit_data_bad_samples", progress.counters["bad"])
    process.watchdog.metrics = metrics
    port = metrics.serve(config.logging) if metrics else None
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
    told = {name: facts[name] for name in ("init_from", "stage", "precision", "dataset", "versions")}
    told |= {"precision_why": resolved.why, "preflight": trial}
    hosts = introduce(run, store, agreement, saved, port, told)
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
        schedule=schedule_of(config, plan.samples, progress.first_batch, progress.step, progress.samples),
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
            ranks_on_node=hosts.count(hosts[ranks.rank]),
            access=config.storage.access,
        ),
        agreement=agreement,
        store=store,
        saving=Saving(store, state, config.checkpoint, agreement, process.timeouts, process.watchdog, metrics),
        average=average,
        validation=None
        if held_out is None
        else Validation(config, held_out, masks, resolved.micro_batch, agreement, device),
        recorder=recorder,
        guard=guard,
        stragglers=Stragglers(agreement, hosts, device, metrics),
        compiled=CompiledBlocks(engine.module, config.compile, loud=ranks.rank == 0),
        profiler=Profiler(config.profile, run.path / "ranks", ranks.rank),
        watchdog=process.watchdog,
        timeouts=process.timeouts,
        metrics=metrics,
        run=run,
        stop=process.stop,
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
        if device.type == "cuda":  # 3 % there; on a CPU nothing that could be measured
            model.compile_score()
    optimizer = build_optimizer(
        model.parameter_groups(config.optimizer.weight_decay),
        config.optimizer,
        fused=True,
    )
    return initialize_engine(model, optimizer, resolved)


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


def _group_names(engine: Any) -> list[dict[str, Any]]:
    """The optimizer's groups by name, with their weight decay."""
    return [
        {"name": group["name"], "weight_decay": group["weight_decay"]} for group in engine.optimizer.param_groups
    ]
