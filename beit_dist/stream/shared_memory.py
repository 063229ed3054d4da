"""Memory that loader workers hand to their rank: getting it, and how much of /dev/shm it takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from beit_dist.errors import SpaceError

SHARED_MEMORY = Path("/dev/shm")


def allocate(nbytes: int) -> Tensor:
    """uint8 memory that another process can map.

    ``torch.empty(n).share_memory_()`` would allocate twice and copy. The call is private, but the one that torch's
    own collate function makes in a worker, for the same reason.
    """
    storage = torch.UntypedStorage._new_shared(nbytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def held_bytes(step_bytes: int, prefetch: int) -> int:
    """What a rank's workers hold at most: the steps they read ahead, and the one that is being copied."""
    return (prefetch + 1) * step_bytes


def room(ranks_on_node: int) -> int | None:
    """Bytes of /dev/shm that a rank may take; None where there is no such place.

    That is what is free now, but no more than a fair share: the other ranks may not have taken theirs yet.
    """
    if not SHARED_MEMORY.is_dir():
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return min(usage.free, usage.total // ranks_on_node)


def fit_prefetch(wanted: int, step_bytes: int, available: int) -> int:
    """The number of steps up to ``wanted`` that workers can read ahead within ``available`` bytes.

    Raises:
        SpaceError: not even one fits.
    """
    if held_bytes(step_bytes, 1) > available:
        raise SpaceError(
            f"{SHARED_MEMORY}: got {available:,} bytes for this rank, expected at least"
            f" {held_bytes(step_bytes, 1):,} to read one step ahead. Enlarge it (docker run --shm-size, or an"
            " emptyDir of medium Memory), use more ranks, or set loader.workers=0, which needs no shared memory."
        )
    return min(wanted, available // step_bytes - 1)
