"""What ``--dry-run`` says of a pre-training: model, masks, data, and the memory that they take."""

from __future__ import annotations

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.durations import counted
from beit_dist.engine.memory import in_words
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Described
from beit_dist.models.activations import backbone_activation_bytes
from beit_dist.models.heads.targets import head_of
from beit_dist.shards.manifest import Manifest
from beit_dist.storage.place import is_url
from beit_dist.stream.held import ring_of, shared_memory_bytes
from beit_dist.stream.lookahead import lanes_of
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.parts import drop_path_depth
from beit_dist.stream.plan import Plan
from beit_dist.tasks.pretraining.choices import unused_settings
from beit_dist.tasks.pretraining.dataset import HeldOut


def model_rows(config: PretrainingConfig, resolved: Resolved, masks: Masks) -> Described:
    """Sizes, input, masks and lanes."""
    model = config.model
    positions = "absolute" if model.absolute_positions else "no absolute"
    bias = "a shared relative bias" if model.relative_positions else "no relative bias"
    scale = f"LayerScale {model.layer_scale:g}" if model.layer_scale else "no LayerScale"
    yield (
        "model",
        f"{model.size}: {model.depth} blocks of width {model.width}, {model.heads} heads; {positions} positions, "
        f"{bias}, {scale}, drop path {model.drop_path:g}",
    )
    yield "input", f"{model.image_size} px in {model.grid}×{model.grid} patches of {model.patch_size} px"
    yield "target", f"{model.target}: {head_of(model).describe(model)}"
    yield "masking", f"{config.masking.mode}: {masks.describe()}"
    if unused := unused_settings(config):
        chosen = f"masking.mode={config.masking.mode} and model.target={model.target}"
        yield "ignored", f"{', '.join(unused)}, which have no effect with {chosen}"
    per_lane = config.global_batch // config.lanes
    whole = (
        "" if config.lanes % resolved.ranks == 0 else "; ranks share lanes, so some blocks are read more than once"
    )
    yield "lanes", f"{config.lanes}, each {per_lane} samples of a batch{whole}"


def introduction_rows(
    config: PretrainingConfig, plan: Plan, manifest: Manifest, held_out: HeldOut | None, masks: Masks, steps: int
) -> Described:
    """The model, what it predicts, and the data.

    Args:
        steps: of the whole run.
    """
    model = config.model
    yield "model", f"{model.size}: {model.depth} blocks of width {model.width}, {model.heads} heads"
    yield "input", f"{model.image_size} px in {model.grid}×{model.grid} patches of {model.patch_size} px"
    yield "target", f"{model.target}: {head_of(model).describe(model)}"
    yield "masking", f"{config.masking.mode}: {masks.describe()}"
    yield "data", f"{config.data}: {plan.samples:,} images × {counted(manifest.views, 'view')}"
    yield held_out_row(config, held_out, steps)


def held_out_row(config: PretrainingConfig, held_out: HeldOut | None, steps: int) -> tuple[str, str]:
    """What is measured on, and when.

    Args:
        steps: of the whole run.
    """
    if held_out is None:
        why = (
            "validation.data=null"
            if config.validation.data is None
            else "beit shards --held-out 2% keeps some aside"
        )
        return "held out", f"nothing, so what the model learns is not measured ({why})"
    count = min(config.validation.samples, held_out.manifest.samples)
    return "held out", f"{held_out.data}: {count:,} images, measured every {config.measured_every(steps):,} steps"


def most_masked(config: PretrainingConfig, masks: Masks) -> int:
    """Masked patches of an image for FLOPs and memory: the head's static number of positions."""
    return min(config.model.patches, masks.positions_per_image)


def activation_parts(config: PretrainingConfig, resolved: Resolved, masks: Masks) -> dict[str, int]:
    """Estimate of what a micro-batch keeps for its backward pass, in the backbone and in the head."""
    model, size = config.model, 4 if resolved.precision == "fp32" else 2
    kept = backbone_activation_bytes(model, size, config.activation_checkpointing)
    head = head_of(model).activation_bytes(model, most_masked(config, masks), size)
    return {"activations": resolved.micro_batch * kept, "logits": resolved.micro_batch * head}


def data_rows(
    config: PretrainingConfig, resolved: Resolved, manifest: Manifest, plan: Plan, masks: Masks
) -> Described:
    """The shards, their order, and what reading takes."""
    shards = manifest.view_shards(0)
    view_bytes = sum(shard.bytes for shard in shards)
    of_a_view = f"{counted(len(shards), 'shard')} ({in_words(view_bytes)}) a view"
    yield (
        "data",
        f"{config.data}: {plan.samples:,} samples in {of_a_view}, {counted(manifest.views, 'view')}; digest "
        f"{manifest.digest[:12]}",
    )
    blocks = f"{counted(plan.blocks, 'block')} of {counted(plan.block_samples, 'sample')}"
    yield "shard plan", f"{blocks}; windows of {counted(plan.window_blocks, 'block')}"
    per_lane = config.global_batch // plan.lanes
    held = shared_memory_bytes(
        layout=manifest.layout,
        positions=masks.positions_per_image,
        rank_rows=resolved.rank_batch,
        loader=config.loader,
        depth=drop_path_depth(config.model.drop_path_rates),
    )
    yield (
        "loader",
        f"{counted(config.loader.workers, 'worker')} a rank, holding up to {in_words(held)} of /dev/shm",
    )
    if is_url(str(config.data)):
        rows = range(resolved.rank_batch)
        ring, limit = ring_of(plan, manifest.layout, rows, per_lane), config.loader.memory_gib
        lanes = len(lanes_of(rows, per_lane))
        how = "blocks are fetched ahead" if ring <= limit * 2**30 else "too much, so single samples are fetched"
        yield "ring", f"{in_words(ring)} a rank for two windows of {lanes} lanes, of {limit:g} GiB allowed: {how}"
