"""Which device is this rank's, and that no other rank has it too."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from beit_dist.errors import PreflightError

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_GPUS_OF_A_TASK = re.compile(r"gres[:/]gpu\b")


def device_index(local_rank: int, count: int, environment: Mapping[str, str] = os.environ) -> int | None:
    """The index of this rank's device among those that it sees; None where there is none for it.

    Ranks that see all devices of their host take one each. A rank that was given devices of its own (``srun
    --gpus-per-task=1`` or ``--gpu-bind``, a wrapper that sets ``CUDA_VISIBLE_DEVICES``) takes one of them: its
    number on the host is no index then. Ranks that were given the same one by mistake are found by :func:`claim`.

    Args:
        local_rank: this rank's number on its host.
        count: devices that it sees.
        environment: says whether they were chosen for this rank.
    """
    if local_rank < count:
        return local_rank
    if count == 0:
        return None
    chosen = any(_names_one(environment.get(name, "")) for name in _VISIBLE)
    by_slurm = (
        any(environment.get(name) for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"))
        or _GPUS_OF_A_TASK.search(environment.get("SLURM_TRES_PER_TASK", "")) is not None
    )
    return local_rank % count if by_slurm or (count == 1 and chosen) else None


def identity(device: torch.device) -> str:
    """What tells a device from all others, on any host; empty where ranks may share it."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def claim(store: Any, rank: int, world: int, name: str) -> None:
    """Claim this rank's device before the ranks talk through theirs: NCCL refuses shared ones in a traceback.

    Collective.

    Args:
        store: the key-value store through which the ranks meet (``torch.distributed.Store``).
        name: what :func:`identity` says of the device.

    Raises:
        PreflightError: two ranks have the same device; on all of them.
    """
    if name:
        owner = int(store.compare_set(f"device/{name}", "", str(rank)))
        if owner != rank:
            first, second = sorted((owner, rank))
            store.set("device/shared", f"ranks {first} and {second} share one device ({name})")
    if store.add("device/claims", 1) == world:
        store.set("device/all", "1")
    store.wait(["device/all"])
    if store.check(["device/shared"]):
        said = store.get("device/shared").decode()
        if store.add("device/told", 1) == world:
            store.set("device/all-told", "1")
        with contextlib.suppress(Exception):  # one rank holds the store and shall not take it away before
            store.wait(["device/all-told"], timedelta(seconds=10))
        raise PreflightError(
            f"{said}, expected one for each rank. Start fewer ranks on a host, or "
            "give each its own (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)"
        )


def _names_one(text: str) -> bool:
    return bool(text.strip()) and "," not in text
