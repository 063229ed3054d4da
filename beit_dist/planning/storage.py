"""What a run reads and writes: samples, checkpoints, views."""

from __future__ import annotations

from dataclasses import dataclass

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.run import RunConfig
from beit_dist.planning.devices import GB, Device, Figure
from beit_dist.shards.sample import SampleLayout
from beit_dist.stream.lookahead import lanes_of

WRITER = 1.5 * GB
"""Bytes a second that a rank writes, from a save's start to its commit: base's state on a local disk
(docs/performance.md)."""
STORE = Figure(10 * GB, "assumed")
"""Bytes a second of a store that :func:`beit_dist.planning.limits.limits` has in mind where none is given; steps
and saves are then limited by no store."""
_COPIED = 0.8
"""Share of the rate to the host that a copy reaches. Assumed."""
SHARD_SAMPLES = 4096
"""Of ``beit shards``."""


@dataclass(frozen=True)
class Reading:
    """Samples that are read while a run trains."""

    sample: int
    """Bytes of a sample; 0 where the data are images, whose sizes are not known."""
    again: float
    """How often each block is fetched from a store: more than once where ranks share lanes."""
    gpu: float
    """Bytes a second of a rank."""
    node: float
    """Of a node."""
    store: float
    """Of all."""


def reading(config: RunConfig, ranks: int, per_node: int, images: float) -> Reading:
    """What a run reads at so many images a second."""
    if not isinstance(config, PretrainingConfig):
        return Reading(0, 1.0, 0.0, 0.0, 0.0)
    model = config.model
    sample = SampleLayout(model.image_size, model.patch_size, model.vocabulary).stride
    share, per_lane = config.global_batch // ranks, config.global_batch // config.lanes
    touched = sum(len(lanes_of(range(rank * share, (rank + 1) * share), per_lane)) for rank in range(ranks))
    again = touched / config.lanes
    whole = images * sample * again
    return Reading(sample, again, whole / ranks, whole / ranks * min(per_node, ranks), whole)


def view_bytes(config: RunConfig, samples: int) -> int:
    """Bytes of one view of the data set; 0 where the data are images."""
    if not isinstance(config, PretrainingConfig):
        return 0
    model = config.model
    layout = SampleLayout(model.image_size, model.patch_size, model.vocabulary)
    whole, rest = divmod(samples, SHARD_SAMPLES)
    return whole * layout.shard_bytes(SHARD_SAMPLES) + (layout.shard_bytes(rest) if rest else 0)


@dataclass(frozen=True)
class Checkpoint:
    """A save."""

    size: int
    """Bytes of all ranks' files."""
    stall: float
    """Seconds that training waits: each rank copies its share to the host's memory."""
    write: float
    """Seconds from its start to its commit, beside the next steps."""
    every: float | None
    """Seconds from one to the next; None where they are counted in steps and the step is not known."""


def checkpoint(
    config: RunConfig, size: int, ranks: int, device: Device, store: float | None, step: float
) -> Checkpoint:
    """What a save takes.

    Args:
        size: bytes of a checkpoint.
        store: bytes a second that it takes in all; None for no limit.
        step: seconds of a step.
    """
    share = size / ranks
    settings = config.checkpoint
    lengths = [60 * settings.every_minutes] if settings.every_minutes else []
    lengths += [settings.every_steps * step] if settings.every_steps else []
    return Checkpoint(
        size,
        share / (_COPIED * device.to_host),
        max(share / WRITER, size / store if store else 0.0),
        min(lengths, default=None),
    )
