"""From a recipe to a loop: images, model, engine, and the newest whole checkpoint, in that order."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from beit_dist.config import OptimizerConfig
from beit_dist.data.crops import CropBatches, ImagePool, centred_view
from beit_dist.data.draws import Purpose, permutation
from beit_dist.data.image_files import ImageFile, is_of_sizes
from beit_dist.engine.average import WeightAverage
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.layout import AVERAGE, Saved, checkpoint_bytes
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.distributed import Agreement
from beit_dist.engine.dry_run import state_bytes
from beit_dist.engine.metrics import TOKENIZER_METRICS, Metrics
from beit_dist.engine.optimizer import build_optimizer
from beit_dist.engine.precision import decide, settle
from beit_dist.engine.preemption import MAX_MINUTES, StopRequest
from beit_dist.engine.preflight import Needs, memory_faults, raise_faults, trial
from beit_dist.engine.process import Process
from beit_dist.engine.resolve import Resolved, combine
from beit_dist.engine.resume import compare_recipes
from beit_dist.engine.run_folder import RunFolder, versions
from beit_dist.engine.saving import Saving
from beit_dist.engine.sinks import open_sinks
from beit_dist.engine.start import (
    initialize_engine,
    introduce,
    open_metrics,
    open_run,
    refuse_if_superseded,
    take_over,
)
from beit_dist.engine.step_log import LogSettings
from beit_dist.engine.tokenizer.codebook import Codebook
from beit_dist.engine.tokenizer.draws import weights_seed
from beit_dist.engine.tokenizer.record import TokenizerRecorder
from beit_dist.engine.tokenizer.training import Parts, Progress, views
from beit_dist.errors import CheckpointError, ConfigError, DataError
from beit_dist.tokenizer_config import TokenizerRecipe
from beit_dist.visual_tokens.dvae import DVAE

BUILT_IN: dict[str, Any] = {"zero_optimization": {"stage": 0}}
"""DeepSpeed's settings when none are given: nothing sharded, weights and gradients in fp32."""

FROZEN = ("model", "seed", "batch", "view_size", "image_size", "crop_scale", "held_out")
"""Settings that make another run."""
SHOWN = (
    *("steps", "lr", "min_lr", "lr_steps", "warmup_steps", "betas", "weight_decay", "clip_grad", "ema"),
    *("temperature", "temperature_steps", "kl_weight", "kl_warmup_steps", "usage_weight"),
)
"""Settings that may change, and change what is learnt: the difference is printed."""
_LOG_LINES = 20
"""Progress lines of a whole training, when they do not go to a terminal."""


def resolve(recipe: TokenizerRecipe, ds_config: Mapping[str, Any] | None, ranks: int) -> Resolved:
    """Combine recipe and JSON, or the built-in one, for ``ranks`` ranks.

    Raises:
        ConfigError: they conflict, the ranks do not divide the batch, or DeepSpeed cannot do it.
    """
    if ds_config is None and recipe.precision == "fp16":
        way_out = "Give --ds_config configs/deepspeed/zero1.json, or use another precision."
        raise ConfigError("precision", "fp16", "DeepSpeed's loss scaler, without which fp16 underflows", way_out)
    return combine(
        BUILT_IN if ds_config is None else ds_config,
        ranks,
        batch=recipe.batch,
        micro_batch=recipe.micro_batch,
        clip_grad=recipe.clip_grad,
        precision="fp32" if ds_config is None else recipe.precision,
        field="batch",
    )


@dataclass(frozen=True)
class NotBegun:
    """A start that was asked to stop while it read the images, before anything was changed."""

    attempt: int
    step: int
    """Where the run is, as it was before."""
    reason: str


def build(
    recipe: TokenizerRecipe, resolved: Resolved, built_in: bool, files: list[ImageFile], process: Process
) -> Parts | NotBegun:
    """Build what a trainer needs and restore the newest whole checkpoint. Collective.

    Raises:
        DataError: there are too few images, or the ranks see different ones.
        PreflightError: a rank's host has too little memory, or the ranks' collectives are wrong.
        CheckpointError: the run in the folder is another one.
    """
    run, store = open_run(recipe, process.agreement, FROZEN)
    with store.unless_superseded():
        return _build(recipe, resolved, built_in, files, process, run, store)


def _build(
    recipe: TokenizerRecipe,
    resolved: Resolved,
    built_in: bool,
    files: list[ImageFile],
    process: Process,
    run: RunFolder,
    store: CheckpointStore,
) -> Parts | NotBegun:
    agreement, device, stop = process.agreement, process.device, process.stop
    ranks = agreement.ranks
    saved = store.newest_whole()
    if saved is not None:
        compare_recipes(recipe, saved.manifest, loud=ranks.rank == 0, frozen=FROZEN, shown=SHOWN)
    was = saved.manifest["arithmetic"] if saved else None
    if built_in:
        taken = decide(recipe.precision, "from the recipe", was, agreement, device, excluded=("fp16",))
        arithmetic, why = taken.precision, taken.why
    else:
        resolved = settle(resolved, was, agreement, device)
        arithmetic, why = resolved.precision, resolved.why

    pool = read_images(recipe, files, agreement, stop)
    if pool is None:
        refuse_if_superseded(store, agreement)  # then the marker is the newer one's to leave
        reason = next((name for name in agreement.gather(stop.name) if name), MAX_MINUTES)
        return NotBegun(store.attempt, saved.step if saved else 0, reason)
    if saved is not None and not pool.has_digest(saved.manifest["images"]):
        raise CheckpointError(f"run {recipe.run} cannot be continued: {_other_images(saved.manifest['images'])}")
    order = permutation(recipe.seed, Purpose.SOURCE_ORDER, (), len(pool)).tolist()
    held_out = views([centred_view(pool[number], recipe.view_size) for number in order[: recipe.held_out]])

    model = DVAE(recipe.model, seed=weights_seed(recipe.seed))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    parameters = sum(map(math.prod, shapes.values()))
    if recipe.preflight:
        _check_hosts(resolved, parameters, agreement, device)
    engine = build_engine(model, recipe, resolved)
    state = EngineState(engine, ranks)
    average = WeightAverage(state, recipe.ema) if recipe.ema else None
    progress = _restore(store, saved, state)
    if average is not None and not (saved and AVERAGE in saved.manifest["state_digests"]):
        average.restart()
    size = checkpoint_bytes(parameters, average is not None)
    take_over(recipe, run, store, agreement, state, saved, size, device)

    metrics = _metrics(recipe, resolved, progress, store) if ranks.rank == 0 else None
    process.watchdog.metrics = metrics
    port = metrics.serve(recipe.logging) if metrics else None
    facts = {
        "stage": resolved.stage,
        "precision": resolved.precision,
        "arithmetic": arithmetic,
        "images": pool.digest,
        "parameters": shapes,
        "config": recipe.model_dump(mode="json"),
        "versions": versions(),
    }
    told = {name: facts[name] for name in ("stage", "precision", "arithmetic", "images", "versions")}
    introduce(run, store, agreement, saved, port, {**told, "precision_why": why})
    if ranks.rank == 0:
        print(
            f"{len(order) - recipe.held_out} images, {recipe.held_out} held out; batch {recipe.batch} = "
            f"{ranks.world} ranks × {resolved.micro_batch} × {resolved.accumulation}; "
            f"ZeRO stage {resolved.stage}, weights {resolved.precision}, convolutions {arithmetic}",
            flush=True,
        )
    codebook = Codebook(recipe, saved.manifest["codebook"] if saved else None)
    recorder = TokenizerRecorder(
        run,
        metrics,
        LogSettings(
            every=recipe.logging.every_steps,
            attempt=store.attempt,
            total_steps=recipe.steps,
            batch=recipe.batch,
            progress=recipe.logging.progress,
            log_lines=_LOG_LINES,
        ),
        codebook,
        open_sinks(recipe, run.path, progress.step) if ranks.rank == 0 else None,
    )
    first_row = ranks.rank * resolved.rank_batch
    return Parts(
        recipe=recipe,
        resolved=resolved,
        arithmetic=arithmetic,
        engine=engine,
        device=device,
        batches=CropBatches(
            pool,
            order[recipe.held_out :],
            batch=recipe.batch,
            side=recipe.image_size,
            scale=recipe.crop_scale,
            share=recipe.image_size / recipe.view_size,
            seed=recipe.seed,
            workers=recipe.workers,
            rows=range(first_row, first_row + resolved.rank_batch),
            first=progress.step,
        ),
        images=len(pool) - recipe.held_out,
        held_out=held_out,
        agreement=agreement,
        store=store,
        state=state,
        average=average,
        shapes=shapes,
        codebook=codebook,
        recorder=recorder,
        saving=Saving(store, state, recipe.checkpoint, agreement, process.timeouts, process.watchdog, metrics),
        watchdog=process.watchdog,
        timeouts=process.timeouts,
        metrics=metrics,
        run=run,
        stop=stop,
        progress=progress,
        facts=facts,
    )


def _other_images(digest: str) -> str:
    """Why the images are not those of a checkpoint that was made with ``digest``."""
    if is_of_sizes(digest):
        return (
            "it was begun by an older version, on other images or on the same ones: this version lists or rejects "
            "some images differently. Start anew in another run folder, or finish with the old version."
        )
    return (
        "it was begun on other images (or with another cache_gib, when some cannot be decoded; or by another "
        "version, which lists or rejects some differently). Give the same images, or choose another run folder."
    )


def read_images(
    recipe: TokenizerRecipe, files: list[ImageFile], agreement: Agreement, stop: StopRequest
) -> ImagePool | None:
    """The images, the same on every rank; None if a rank was asked to stop meanwhile. Collective.

    Raises:
        DataError: there are too few, or the ranks see different ones.
    """
    needed = math.ceil(recipe.view_size / recipe.crop_scale[0])
    pool = ImagePool(
        files,
        needed,
        int(recipe.cache_gib * 2**30),
        recipe.workers,
        recipe.held_out + 1,
        recipe.storage.access,
        lambda: stop.known,
    )
    if any(agreement.gather(stop.known)):
        return None
    if pool.rejected and agreement.ranks.rank == 0:
        print(f"{len(pool.rejected)} images left out, first {pool.rejected[0]}", flush=True)
    found = agreement.gather((socket.gethostname(), len(pool), pool.digest))
    others = [
        f"rank {rank} on {host} has {count}" for rank, (host, count, own) in enumerate(found) if own != found[0][2]
    ]
    if others:
        raise DataError(
            f"the ranks see different images: rank 0 on {found[0][0]} has {found[0][1]}, {'; '.join(others[:4])}. "
            "Give all hosts the same folder or tars."
        )
    return pool


def build_engine(model: DVAE, recipe: TokenizerRecipe, resolved: Resolved) -> Any:
    """The optimizer, and DeepSpeed's engine around it and the model."""
    named = list(model.named_parameters())
    decayed = [parameter for name, parameter in named if name.endswith(".w")]
    others = [parameter for name, parameter in named if not name.endswith(".w")]
    settings = OptimizerConfig(
        lr=recipe.lr,
        min_lr=recipe.min_lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        clip_grad=recipe.clip_grad,
    )
    optimizer = build_optimizer(
        [
            {"name": "decay", "params": decayed, "weight_decay": recipe.weight_decay},
            {"name": "no_decay", "params": others, "weight_decay": 0.0},
        ],
        settings,
        fused=True,
    )
    return initialize_engine(model, optimizer, resolved)


def _check_hosts(resolved: Resolved, parameters: int, agreement: Agreement, device: torch.device) -> None:
    """Refuse a start for which a host has too little memory, or whose ranks do not hear each other right."""
    host = socket.gethostname()
    neighbours = agreement.gather(host).count(host)
    average_and_measured = 8 * parameters
    needed = Needs(sum(state_bytes(resolved, parameters).values()) + average_and_measured, shared=0)
    faults = memory_faults(needed, device, neighbours)
    _, fault = trial(agreement, device)
    raise_faults(agreement.gather((host, [*faults, fault] if fault else faults)))


def _restore(store: CheckpointStore, saved: Saved | None, state: EngineState) -> Progress:
    if saved is None:
        return Progress()
    store.restore(saved, state)
    if store.rank == 0:
        print(f"resumed from {saved.folder.name}: step {saved.step}", flush=True)
    return Progress(step=saved.step, skipped=saved.manifest["counters"]["skipped"])


def _metrics(recipe: TokenizerRecipe, resolved: Resolved, progress: Progress, store: CheckpointStore) -> Metrics:
    metrics = open_metrics(
        recipe,
        resolved,
        store,
        steps=progress.step,
        skipped=progress.skipped,
        samples=progress.step * recipe.batch,
        total_steps=recipe.steps,
        table=TOKENIZER_METRICS,
    )
    not_yet = {metric.name: math.nan for metric in TOKENIZER_METRICS if "held_out" in metric.name}
    metrics.set({"beit_tokenizer_vocabulary": recipe.model.vocabulary, **not_yet})
    return metrics
