"""What ranks send each other in a step, by ZeRO stage, as DeepSpeed 0.19 does it with the shipped JSON files.

A ring of N ranks moves (N − 1)/N of a payload past each rank for a gather or a scatter, and twice that for an
all-reduce (Patarasuk and Yuan, 2009). Its slowest link sets the pace: within a node the devices' own, else the
node's network, which the rings share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from beit_dist.engine.ranks.processors import is_left_to_us
from beit_dist.engine.resolve import Resolved
from beit_dist.planning.devices import Device

REACHED = 0.8
"""Share of a link's rate that collectives reach. Assumed."""
HOP = 20e-6
"""Seconds that a collective takes besides its bytes, once within a node and once for each doubling of the nodes.
Assumed."""
_FALLBACK = 500_000_000
"""Values of a bucket where DeepSpeed reduces after the backward pass (MEMORY_OPT_ALLREDUCE_SIZE)."""
_BUCKET = 500_000_000
"""Values of a bucket where the JSON does not say (DeepSpeed's default)."""

_LIVE = 1_000_000_000
"""Weights that stage 3 keeps at once where the JSON does not say (DeepSpeed's default)."""


@dataclass(frozen=True)
class Exchange:
    """A collective over all ranks, or several alike."""

    kind: str
    """``all-reduce``, ``all-gather`` or ``reduce-scatter``."""
    payload: float
    """Bytes of the whole tensor, each time."""
    times: int
    """In a step."""
    calls: int
    """Buckets that the payload comes in."""
    hidden: bool
    """Runs beside the backward pass."""

    def sent(self, ranks: int) -> float:
        """Bytes that pass each rank in a step."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (ranks - 1) / ranks * self.payload * self.times

    def seconds(self, ranks: int, per_node: int, device: Device) -> float:
        """Of all of them in a step."""
        if ranks == 1:
            return 0.0
        nodes = math.ceil(ranks / per_node)
        rate = device.link if nodes == 1 else min(device.link, device.network)
        hops = 1 + math.log2(nodes)
        return self.sent(ranks) / (REACHED * rate) + self.times * self.calls * hops * HOP


def exchanges(resolved: Resolved, parameters: int, *, cpu: bool) -> Iterator[Exchange]:
    """What ranks exchange in a step, as DeepSpeed does it and, on CPUs, :mod:`beit_dist.engine.ranks.processors`.

    Stage 0 and, in bf16 with sums in fp32, stage 1 reduce once a step, after the backward pass. Stages 2 and 3
    reduce in each micro-batch. Stages 1 and 2 reduce by all-reduce (``use_multi_rank_bucket_allreduce``) and
    gather the weights after the update. Stage 3 gathers them for each micro-batch, twice where it may not keep all
    from the forward to the backward pass (``stage3_max_live_parameters``), and scatters gradients. It alone
    overlaps by default.

    Args:
        parameters: of the model.
        cpu: whether ranks are on CPUs.
    """
    zero = resolved.deepspeed.get("zero_optimization", {})
    size = 4 if resolved.precision == "fp32" else 2
    payload, stage = size * parameters, resolved.stage
    bucket = zero.get("reduce_bucket_size", _BUCKET)
    hidden = bool(zero.get("overlap_comm", stage == 3))
    if stage == 0 or sums_beside(resolved):
        as_summed = cpu and stage == 1 and is_left_to_us(resolved.deepspeed)
        reduced = 4 * parameters if as_summed else payload
        yield Exchange("all-reduce", reduced, 1, math.ceil(parameters / _FALLBACK), False)
    elif stage < 3:
        times = resolved.accumulation if stage == 2 else 1
        yield Exchange("all-reduce", payload, times, math.ceil(parameters / bucket), hidden)
    if stage in (1, 2):
        gathered = zero.get("allgather_bucket_size", _BUCKET)
        yield Exchange("all-gather", payload, 1, math.ceil(parameters / gathered), False)
    if stage == 3:
        prefetched = zero.get("stage3_prefetch_bucket_size", _BUCKET)
        calls = math.ceil(parameters / prefetched)
        passes = 1 if parameters <= zero.get("stage3_max_live_parameters", _LIVE) else 2
        yield Exchange("all-gather", payload, passes * resolved.accumulation, calls, hidden)
        calls = math.ceil(parameters / bucket)
        yield Exchange("reduce-scatter", payload, resolved.accumulation, calls, hidden)


def sums_beside(resolved: Resolved) -> bool:
    """Whether DeepSpeed's BF16_Optimizer runs, which sums gradients in fp32 and reduces them at the end."""
    return (resolved.stage, resolved.precision, resolved.accumulation_type) == (1, "bf16", "fp32")
