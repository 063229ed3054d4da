"""Before a run allocates anything: is there memory on every rank, and do the ranks hear each other right.

What is wrong anywhere is named, with rank and host, in one error on all ranks, rather than by the first rank
that an allocation or a collective breaks on.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from beit_dist.engine.memory import size_of_checkpoint, training_bytes
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.engine.resolve import Resolved
from beit_dist.engine.task import Needs, Task
from beit_dist.errors import PreflightError
from beit_dist.stream import shared_memory

_NUMBERS = 2**18
"""float32 values of the trial all-reduce: 1 MiB, enough to go through the transport that training uses."""
_TRIALS = 3
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def preflight(
    task: Task[Any, Any, Any], resolved: Resolved, agreement: Agreement, device: torch.device
) -> dict[str, Any]:
    """Check every rank; the trial's timings, for ``run.json``. Collective.

    Raises:
        PreflightError: what is wrong, by rank and host; the same on all ranks.
    """
    host = socket.gethostname()
    neighbours = agreement.gather(host).count(host)
    needed = task.needs(resolved)
    held, copied = sum(training_bytes(task, resolved).values()), size_of_checkpoint(task) // resolved.ranks
    faults = memory_faults(replace(needed, model=needed.model + held, copy=copied), device, neighbours)
    seconds, fault = trial(agreement, device)
    faults += [fault] if fault else []
    found = agreement.gather((host, faults, seconds))
    raise_faults([(host, faults) for host, faults, _ in found])
    slowest = max(seconds for _, _, seconds in found)
    return {"all_reduce_bytes": 4 * _NUMBERS, "all_reduce_seconds": round(slowest, 6)}


def memory_faults(needed: Needs, device: torch.device, neighbours: int) -> list[str]:
    """What this rank lacks, in words.

    Args:
        needed: what it needs, the engine's state and checkpoints included.
        device: where the model will be.
        neighbours: ranks on this host, itself included, which share the host's memory.
    """
    faults = []
    host = free_host_memory()
    share = None if host is None else host // neighbours
    in_host = f"memory of the host for each of {neighbours} ranks"
    state, copy = "weights, gradients and optimizer", "the copy that a checkpoint is written from"
    of_host, way_out = needed.copy + needed.blocks, ""
    if needed.blocks:
        copy += f", and {_gib(needed.blocks)} of data fetched ahead"
        way_out = f"lower {needed.blocks_setting}, "
    if device.type == "cuda":
        looked_at = [
            (torch.cuda.mem_get_info(device)[0], needed.model, f"memory of {device}", state),
            (share, of_host, in_host, copy),
        ]
    else:
        looked_at = [(share, needed.model + of_host, in_host, f"{state}, and {copy}")]
    for free, wanted, where, purpose in looked_at:
        if free is not None and free < wanted:
            faults.append(
                f"{_gib(free)} free {where}, expected at least {_gib(wanted)} for {purpose}. Use a higher ZeRO "
                f"stage, more ranks, {way_out}or stop other programs there"
            )
    room = shared_memory.room(neighbours)
    if room is not None and room < needed.shared:
        faults.append(
            f"{_gib(room)} of {shared_memory.SHARED_MEMORY} for each of {neighbours} ranks, expected at least "
            f"{_gib(needed.shared)}. Enlarge it (docker run --shm-size), or set loader.workers=0"
        )
    return faults


def trial(agreement: Agreement, device: torch.device) -> tuple[float, str | None]:
    """Sum known numbers over the ranks: seconds of the fastest try, and what is wrong with the answer."""
    world, rank = agreement.ranks.world, agreement.ranks.rank
    if world == 1:
        return 0.0, None
    expected = world * (world + 1) / 2  # exact in float32 for up to 5792 ranks
    fastest, worst = float("inf"), expected
    for _ in range(_TRIALS):
        numbers = torch.full((_NUMBERS,), float(rank + 1), device=device)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        low, high = numbers.min().item(), numbers.max().item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
        worst = low if low != expected else high if high != expected else worst
    if worst == expected:
        return fastest, None
    return fastest, f"a trial all-reduce gave {worst:g}, expected {expected:g}: its network or device is faulty"


def raise_faults(found: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise what all ranks found, if anything.

    Args:
        found: host and faults of each rank, in the order of ranks.

    Raises:
        PreflightError: there are faults.
    """
    lines = [f"rank {rank} on {host}: {fault}" for rank, (host, faults) in enumerate(found) for fault in faults]
    if lines:
        raise PreflightError("; ".join(lines) + ". preflight=false starts anyway.")


def free_host_memory(control_group: Path = _CONTROL_GROUP, processes: Path = Path("/proc")) -> int | None:
    """Bytes that can be had without swapping, within the container's limit (cgroup version 2) if there is one.

    None where the system does not say.
    """
    try:
        said = dict(line.split(":") for line in (processes / "meminfo").read_text().splitlines())
        free = 1024 * int(said["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = (control_group / "memory.max").read_text().strip()
        used = int((control_group / "memory.current").read_text())
        statistics = dict(line.split() for line in (control_group / "memory.stat").read_text().splitlines())
        cache = int(statistics.get("inactive_file", 0))  # given back when memory is needed
        return free if limit == "max" else min(free, max(0, int(limit) - used + cache))
    except (OSError, ValueError):
        return free


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"
