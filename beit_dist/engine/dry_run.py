"""``--dry-run``: everything that can be known before a run starts, computed and printed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from beit_dist.config import TrainConfig
from beit_dist.data.lookahead import lanes_of
from beit_dist.data.pipeline import drop_path_depth
from beit_dist.data.shards import Manifest
from beit_dist.data.stream import ring_of, shared_memory_bytes
from beit_dist.engine.checkpoint.layout import BYTES_OF_STATE, checkpoint_bytes
from beit_dist.engine.dataset import build_plan, expected_masked, mask_generator
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.schedule import schedule_of, steps_of
from beit_dist.models.flops import multiply_adds
from beit_dist.models.mim import MaskedImageModel
from beit_dist.storage.place import is_url


def describe(config: TrainConfig, resolved: Resolved, manifest: Manifest | None) -> str:
    """The resolved run as text, one subject a line; without data the shard plan and the steps are left out."""
    rows = [*_model_rows(config), *_batch_rows(config, resolved), *_memory_rows(config, resolved)]
    if manifest is None:
        rows.append(("data", "none given: the shard plan, the steps and the schedule are skipped (add data=DIR)"))
    else:
        rows += _data_rows(config, resolved, manifest)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def count_parameters(config: TrainConfig) -> int:
    """Trainable parameters, without allocating them."""
    with torch.device("meta"):
        model = MaskedImageModel(config.model)
    return sum(parameter.numel() for parameter in model.parameters())


def state_bytes(resolved: Resolved, parameters: int) -> dict[str, int]:
    """Bytes of a rank's weights, gradients and optimizer state at its stage and precision."""
    low = 4 if resolved.precision == "fp32" else 2
    gradients = low if resolved.accumulation_type == resolved.precision else 4
    if resolved.stage == 1 and resolved.precision == "bf16" and resolved.accumulation_type == "fp32":
        gradients += low  # DeepSpeed's BF16_Optimizer keeps the fp32 sums of all parameters beside the bf16 ones
    state = 8 if resolved.optimizer_is_bare else BYTES_OF_STATE  # the weights are their own masters there
    return {
        "weights": low * parameters // (resolved.ranks if resolved.stage >= 3 else 1),
        "gradients": gradients * parameters // (resolved.ranks if resolved.stage >= 2 else 1),
        "optimizer": state * parameters // (resolved.ranks if resolved.stage >= 1 else 1),
    }


def _model_rows(config: TrainConfig) -> Iterator[tuple[str, str]]:
    model, masks = config.model, mask_generator(config)
    positions = "absolute" if model.absolute_positions else "no absolute"
    bias = "a shared relative bias" if model.relative_positions else "no relative bias"
    scale = f"LayerScale {model.layer_scale:g}" if model.layer_scale else "no LayerScale"
    yield "run", config.run
    yield (
        "model",
        f"{model.size}: {model.depth} blocks of width {model.width}, {model.heads} heads; {positions} positions, "
        f"{bias}, {scale}, drop path {model.drop_path:g}",
    )
    yield (
        "input",
        f"{model.image_size} px in {model.grid}×{model.grid} patches of {model.patch_size} px; vocabulary "
        f"{model.vocabulary}",
    )
    yield "parameters", f"{count_parameters(config):,}"
    masked = expected_masked(model, masks)
    at_most = "" if config.masking.mode == "exact" else "at most "
    blocks = f"blocks of at least {config.masking.min_block}"
    yield "masking", f"{config.masking.mode}: {at_most}{masked} of {model.patches} patches, {blocks}"
    work = multiply_adds(model, masked)
    yield "FLOPs", f"{6 * work / 1e9:.4g} G per image: 6 × {work / 1e9:.4g} G multiply-adds of backbone and head"


def _batch_rows(config: TrainConfig, resolved: Resolved) -> Iterator[tuple[str, str]]:
    yield (
        "batch",
        f"{config.global_batch} = {resolved.ranks} ranks × {resolved.micro_batch} micro-batch × "
        f"{resolved.accumulation} accumulation",
    )
    per_lane = config.global_batch // config.lanes
    whole = "" if config.lanes % resolved.ranks == 0 else "; ranks cut lanes: some blocks are read more than once"
    yield "lanes", f"{config.lanes}, each {per_lane} samples of a batch{whole}"
    yield (
        "precision",
        f"{resolved.precision} ({resolved.why}), gradients summed in {resolved.accumulation_type}, "
        f"ZeRO stage {resolved.stage}",
    )


def _memory_rows(config: TrainConfig, resolved: Resolved) -> Iterator[tuple[str, str]]:
    parameters = count_parameters(config)
    parts = state_bytes(resolved, parameters)
    size = checkpoint_bytes(parameters, config.ema.decay is not None)
    if config.ema.decay is not None:
        parts["average"] = 4 * parameters // resolved.ranks
    activations = activation_bytes(config, resolved)
    total = sum(parts.values()) + activations
    listed = " + ".join(f"{name} {_size(size)}" for name, size in parts.items())
    yield "memory", f"{_size(total)} a rank: {listed} + activations about {_size(activations)}"
    keep = config.checkpoint.keep
    yield "checkpoint", f"{_size(size)} each, {keep} kept: {_size(size * (keep + 1))} of free space needed"


def activation_bytes(config: TrainConfig, resolved: Resolved) -> int:
    """Estimate of what a micro-batch keeps for its backward pass.

    A block keeps about 17 values per token and channel (two norms, qkv, attention's result, two projections,
    and the four-fold hidden layer before and after GELU); the head the logits, in the model's precision and
    twice in fp32.
    """
    model, size = config.model, 4 if resolved.precision == "fp32" else 2
    block = 17 * (1 + model.patches) * model.width * size
    head = expected_masked(model, mask_generator(config)) * model.vocabulary * (size + 8)
    kept = model.depth * block
    if config.activation_checkpointing:  # each block's input, and one block at a time
        kept = model.depth * (1 + model.patches) * model.width * size + block
    return resolved.micro_batch * (kept + head)


def _data_rows(config: TrainConfig, resolved: Resolved, manifest: Manifest) -> Iterator[tuple[str, str]]:
    plan = build_plan(config, manifest)
    shards = manifest.view_shards(0)
    view_bytes = sum(shard.bytes for shard in shards)
    yield (
        "data",
        f"{config.data}: {plan.samples:,} samples in {len(shards)} shards ({_size(view_bytes)}) a view, "
        f"{manifest.views} views; digest {manifest.digest[:12]}",
    )
    yield (
        "shard plan",
        f"blocks of {plan.block_samples} samples, {plan.blocks:,} of them; windows of {plan.window_blocks}",
    )
    steps = steps_of(config, plan.samples)
    schedule = schedule_of(config, plan.samples, config.global_batch)
    epochs = steps * config.global_batch / plan.samples
    yield "steps", f"{steps:,} for {epochs:g} epochs; {plan.samples / config.global_batch:.1f} steps an epoch"
    optimizer = config.optimizer
    yield (
        "schedule",
        f"warm-up over {schedule.warmup:g} steps to {optimizer.lr:g}, cosine to {optimizer.min_lr:g}",
    )
    held = shared_memory_bytes(
        layout=manifest.layout,
        positions=mask_generator(config).positions_per_image,
        rank_rows=resolved.rank_batch,
        loader=config.loader,
        depth=drop_path_depth(config.model.drop_path_rates),
    )
    yield "loader", f"{config.loader.workers} workers a rank, holding up to {_size(held)} of /dev/shm"
    if is_url(str(config.data)):
        per_lane = config.global_batch // plan.lanes
        rows = range(resolved.rank_batch)
        ring, limit = ring_of(plan, manifest.layout, rows, per_lane), config.loader.memory_gib
        lanes = len(lanes_of(rows, per_lane))
        how = "blocks are fetched ahead" if ring <= limit * 2**30 else "too much, so single samples are fetched"
        yield "ring", f"{_size(ring)} a rank for two windows of {lanes} lanes, of {limit:g} GiB allowed: {how}"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
