"""Opening a data set for a run: is it the one the recipe describes, is every shard there, and in what order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.errors import ConfigError, DataError, UserError
from beit_dist.models.heads.base import Counts
from beit_dist.models.heads.targets import head_of
from beit_dist.shards.manifest import HELD_OUT_NAME, Manifest, check_shard_files, load_held_out, load_manifest
from beit_dist.shards.statistics import load_statistics
from beit_dist.step_numbers import KnownBaselines
from beit_dist.storage.access import Access
from beit_dist.stream.plan import Plan
from beit_dist.weights.tokenizer_files import tokenizer_digests


def open_data(config: PretrainingConfig, *, check_files: bool) -> Manifest:
    """Read the manifest of ``config.data`` and compare it with the recipe.

    Args:
        config: the recipe; its ``data`` must be set.
        check_files: also compare every shard file's size with the manifest.

    Raises:
        ConfigError: the recipe's image, patch or, where tokens are the target, vocabulary is another one.
        DataError: the data set is missing or damaged, or was made by another tokenizer.
    """
    if config.data is None:
        raise ConfigError("data", None, "the folder or URL that beit shards wrote to", "Add data=DIR.")
    manifest = load_manifest(config.data, config.storage.access)
    layout = manifest.layout
    for name in head_of(config.model).shared_with_shards:
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
                f"{manifest.tokenizer[:12]}, which made the shards in {config.data}. Use that file, or make "
                "the shards again with this one."
            )
    if check_files:
        check_shard_files(config.data, manifest, config.storage.access)
    return manifest


class HeldOut(NamedTuple):
    """What is measured on."""

    data: str
    """Its folder or URL."""
    manifest: Manifest


def open_validation(config: PretrainingConfig, manifest: Manifest, *, check_files: bool) -> HeldOut | None:
    """Read the manifest of ``config.validation.data`` and compare it with the training data's.

    Args:
        config: the recipe; with ``auto`` the images are those that the data set of ``config.data`` holds out.
        manifest: of the training data.
        check_files: also compare every shard file's size with the manifest.

    Returns:
        None if nothing is measured.

    Raises:
        DataError: it is missing or damaged, has other shapes, or was made by another tokenizer.
    """
    data, access = config.validation.data, config.storage.access
    held_out: Manifest | None = None
    if data == "auto":
        if config.data is not None:
            held_out, data = load_held_out(config.data, access), f"{config.data.rstrip('/')}/{HELD_OUT_NAME}"
    elif data is not None:
        held_out = load_manifest(data, access)
    if data is None or held_out is None:
        return None
    for name, got, expected in (
        ("layout", held_out.layout, manifest.layout),
        ("tokenizer", held_out.tokenizer, manifest.tokenizer),
    ):
        if got != expected:
            raise DataError(
                f"validation.data: got {data} with {name} {got}, expected {expected} of {config.data}. Make its "
                "shards with the tokenizer and the sizes of the training shards, or give validation.data=null."
            )
    if held_out.digest == manifest.digest:
        raise ConfigError("validation.data", data, "images that are not trained on, but it is the training set")
    if check_files:
        check_shard_files(data, held_out, access)
    return HeldOut(data, held_out)


def counts_of(where: str, manifest: Manifest, access: Access) -> Counts | None:
    """What the samples of a data set are made of; None where it has no statistics, or they cannot be had."""
    statistics = load_statistics(where, manifest, access)
    return None if statistics is None else Counts(statistics.tally.tokens, statistics.tally.pixels)


def known_baselines(config: PretrainingConfig, manifest: Manifest, held_out: HeldOut | None) -> KnownBaselines:
    """What a run's numbers come to without learning from images, where its data sets have statistics."""
    head, access = head_of(config.model), config.storage.access
    known = counts_of(str(config.data), manifest, access)
    training = head.baselines(config.model, known)
    unknown = "" if known else f"others are unknown: run beit inspect {config.data}"
    if held_out is None:
        return KnownBaselines(training, unknown=unknown)
    scored = counts_of(held_out.data, held_out.manifest, access)
    return KnownBaselines(training, head.baselines(config.model, known if scored else None, scored), unknown)


def baselines_of(config: PretrainingConfig) -> KnownBaselines:
    """The same from a recipe alone, whose data sets may no longer be there."""
    config = config.model_copy(update={"tokenizer": None})  # nor need this be
    try:
        manifest = open_data(config, check_files=False)
    except UserError:
        unknown = f"others are unknown: the data set {config.data} cannot be read"
        return KnownBaselines(head_of(config.model).baselines(config.model, None), unknown=unknown)
    try:
        held_out = open_validation(config, manifest, check_files=False)
    except UserError:
        held_out = None
    return known_baselines(config, manifest, held_out)


def build_plan(config: PretrainingConfig, manifest: Manifest, saved: Mapping[str, Any] | None = None) -> Plan:
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
            f"a multiple of the run's {plan.lanes} lanes, whose number never changes",
        )
    return plan
