"""What breaks first when a run gets more GPUs: the number from which each limit holds, and what to change then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from beit_dist.errors import ConfigError
from beit_dist.planning.devices import GB
from beit_dist.planning.memory import AnyTask
from beit_dist.planning.plan import Choice, Plan, make_plan
from beit_dist.planning.storage import STORE

MOST = 16_384
"""GPUs up to which limits are looked for."""
EXPOSED = 0.1
"""Share of a step in which ranks only exchange, above which it is a limit."""
OPEN_FILES = 1024
"""Files that a process may open on most Linux systems (the soft limit, ``ulimit -n``)."""
_OWN_FILES = 22
"""Files that a rank has open besides, measured with 2 to 128 ranks."""
_PER_RANK = 2
"""Connections of rank 0 to each rank: one as the store's server, one in gloo's group, which connects each pair of
ranks (measured); on a CPU, where the ranks' own group is gloo's too, 3."""


@dataclass(frozen=True)
class Limit:
    """Something that holds from a number of GPUs on."""

    gpus: int
    what: str
    instead: str
    """What to change."""


def limits(task: AnyTask, ds_configs: Mapping[int, Mapping[str, Any]], plan: Plan) -> list[Limit]:
    """What breaks, by the number of GPUs, if nothing but their number is changed.

    Looks at those doublings of one GPU that the global batch can be dealt to.

    Args:
        task: of the run.
        ds_configs: as for :func:`beit_dist.planning.plan.make_plan`.
        plan: for any number of GPUs: its best choice's stage is kept, so that one thing changes only.
    """
    stage = 1 if plan.best is None else plan.best.resolved.stage
    found: dict[str, Limit] = {}
    batch = task.config.global_batch
    largest = 1
    for gpus in _doublings():
        try:
            at = make_plan(task, {stage: ds_configs[stage]}, replace(plan.question, gpus=gpus))
        except ConfigError:
            break
        largest = gpus
        if at.best is not None:
            for name, limit in _of(task, at, at.best).items():
                found.setdefault(name, limit)
    if largest < MOST:
        instead = "raise global_batch, and optimizer.lr by the square root of its ratio (docs/recipes.md)"
        found["deal"] = Limit(2 * largest, f"this many GPUs do not divide the global batch of {batch:,}", instead)
    return sorted(found.values(), key=lambda limit: limit.gpus)


def files_of_rank_0(ranks: int, cpu: bool) -> int:
    """Files that rank 0 has open."""
    return _OWN_FILES + (_PER_RANK + cpu) * ranks


def _doublings() -> list[int]:
    return [2**power for power in range(int(math.log2(MOST)) + 1)]


def _of(task: AnyTask, plan: Plan, best: Choice) -> dict[str, Limit]:
    question, config, resolved = plan.question, task.config, best.resolved
    gpus, found = question.gpus, {}

    def limit(name: str, holds: bool, what: str, instead: str) -> None:
        if holds:
            found[name] = Limit(gpus, what, instead)

    limit(
        "small",
        best.micro.launches > best.micro.arithmetic,
        f"a GPU has {resolved.micro_batch} images at once, too few to keep it busy",
        "raise global_batch and optimizer.lr" if config.compile else "set compile=true, then raise global_batch",
    )
    limit(
        "exposed",
        best.exposed_share > EXPOSED,
        f"the exposed exchange of gradients and weights takes {best.exposed_share:.0%} of a step",
        _less_exchange(resolved.stage, plan),
    )
    store = question.store or STORE
    limit(
        "store",
        config.global_batch * best.reading.sample * best.reading.again
        > store.value * (best.compute + best.exposed),
        f"the GPUs read more than a store of {store.value / GB:g} GB/s ({store.source}) can send",
        "set loader.cache_dir, copy the shards to the nodes, or use a faster store",
    )
    again = best.reading.again
    limit(
        "lanes",
        again > 1,
        f"ranks share lanes, so each block is fetched {again:.2g} times from a store",
        f"start with loader.lanes={_lanes(config.global_batch, gpus)}",
    )
    saved = plan.checkpoint
    limit(
        "checkpoint",
        saved is not None and saved.every is not None and saved.write > saved.every,
        "writing a checkpoint takes longer than the time between two checkpoints",
        "save less often, or to a faster store",
    )
    files = files_of_rank_0(gpus, question.device.is_cpu)
    limit(
        "files",
        files > OPEN_FILES,
        f"rank 0 has {files:,} files open, more than the usual ulimit -n of {OPEN_FILES:,}",
        "raise it in the job script: ulimit -n 65536",
    )
    return found


def _less_exchange(stage: int, plan: Plan) -> str:
    if stage > 1:
        return "use ZeRO stage 1, a faster network, or a larger global_batch"
    return "use a faster network (--network), or a larger global_batch"


def _lanes(batch: int, gpus: int) -> int:
    """The smallest divisor of the global batch that all ranks divide."""
    return next(lanes for lanes in range(gpus, batch + 1, gpus) if batch % lanes == 0)
