"""Opening a data set for a run: is it the one the recipe describes, is every shard there, and in what order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from beit_dist.config import ModelConfig, TrainConfig
from beit_dist.data.masking import MaskGenerator
from beit_dist.data.plan import Plan
from beit_dist.data.shards import Manifest, check_shard_files, load_manifest
from beit_dist.errors import ConfigError, DataError
from beit_dist.visual_tokens.weights import tokenizer_digests


def open_data(config: TrainConfig, *, check_files: bool) -> Manifest:
    """Read the manifest of ``config.data`` and compare it with the recipe.

    Args:
        config: the recipe; its ``data`` must be set.
        check_files: also compare every shard file's size with the manifest.

    Raises:
        ConfigError: the recipe's image, patch or vocabulary is another one.
        DataError: the data set is missing or damaged, or was made by another tokenizer.
    """
    if config.data is None:
        raise ConfigError("data", None, "the folder or URL that tools/shard_tokens.py wrote to", "Add data=DIR.")
    manifest = load_manifest(config.data, config.storage.access)
    layout = manifest.layout
    for name in ("image_size", "patch_size", "vocabulary"):
        ours, theirs = getattr(config.model, name), getattr(layout, name)
        if ours != theirs:
            raise ConfigError(
                f"model.{name}",
                ours,
                f"{theirs}, with which the shards in {config.data} were made",
                f"Set model.{name}={theirs}, or make shards for {ours}.",
            )
    if config.tokenizer is not None:
        digests = tokenizer_digests(config.tokenizer)
        if manifest.tokenizer not in digests:
            raise DataError(
                f"tokenizer: got {config.tokenizer} with digest {digests[0][:12]}, expected "
                f"{manifest.tokenizer[:12]} that made the shards in {config.data}. Use that file, or make "
                "the shards again with this one."
            )
    if check_files:
        check_shard_files(config.data, manifest, config.storage.access)
    return manifest


def open_validation(config: TrainConfig, manifest: Manifest, *, check_files: bool) -> Manifest | None:
    """Read the manifest of ``config.validation.data``, if it is given, and compare it with the training data's.

    Args:
        config: the recipe.
        manifest: of the training data.
        check_files: also compare every shard file's size with the manifest.

    Raises:
        DataError: it is missing or damaged, has other shapes, or was made by another tokenizer.
    """
    data = config.validation.data
    if data is None:
        return None
    held_out = load_manifest(data, config.storage.access)
    for name, got, expected in (
        ("layout", held_out.layout, manifest.layout),
        ("tokenizer", held_out.tokenizer, manifest.tokenizer),
    ):
        if got != expected:
            raise DataError(
                f"validation.data: got {data} with {name} {got}, expected {expected} of {config.data}. Make its "
                "shards with the tokenizer and the sizes of the training shards."
            )
    if held_out.digest == manifest.digest:
        raise ConfigError("validation.data", data, "images that are not trained on, but it is the training set")
    if check_files:
        check_shard_files(data, held_out, config.storage.access)
    return held_out


def build_plan(config: TrainConfig, manifest: Manifest, saved: Mapping[str, Any] | None = None) -> Plan:
    """The order of samples; ``saved`` are the constants of the run that is continued, which then hold.

    Raises:
        CheckpointError: data, seed or an explicitly given setting differ from the saved constants.
        ConfigError: the global batch is no multiple of the lanes.
    """
    loader = config.loader
    lanes, block = config.lanes, loader.block_samples
    if saved is not None:
        lanes = loader.lanes if loader.lanes is not None else saved["lanes"]
        block = block if block is not None else saved["block_samples"]
    plan = Plan(
        shard_samples=[shard.samples for shard in manifest.view_shards(0)],
        views=manifest.views,
        seed=config.seed,
        lanes=lanes,
        block_samples=block,
        window_blocks=loader.window_blocks,
        dataset_digest=manifest.digest,
    )
    if saved is not None:
        plan.check(saved)
    if config.global_batch % plan.lanes:
        raise ConfigError(
            "global_batch",
            config.global_batch,
            f"a multiple of the run's {plan.lanes} lanes, which are kept for its life",
        )
    return plan


def mask_generator(config: TrainConfig) -> MaskGenerator:
    """The generator of the recipe's masks."""
    return MaskGenerator(config.model.grid, config.masking, config.seed)


def expected_masked(model: ModelConfig, masks: MaskGenerator) -> int:
    """Masked patches of an image for FLOPs and memory: the head's static number of positions."""
    return min(model.patches, masks.positions_per_image)
