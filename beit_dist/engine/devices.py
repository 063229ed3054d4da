"""Which device is this rank's: chosen before it joins the others, and compared with theirs once it has."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from beit_dist.errors import PreflightError

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_GPUS_OF_A_TASK = re.compile(r"gres[:/]gpu\b")


def device_index(local_rank: int, count: int, environment: Mapping[str, str] = os.environ) -> int | None:
    """The index of this rank's device among those that it sees; None where there is none for it.

    Ranks that see all devices of their host take one each. A rank that was given devices of its own (``srun
    --gpus-per-task=1``, a wrapper that sets ``CUDA_VISIBLE_DEVICES``) takes the first of them: its number on the
    host is no index then. Ranks that were given the same one by mistake are found by :func:`refuse_shared`.

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
    by_slurm = bool(environment.get("SLURM_GPUS_PER_TASK")) or bool(
        _GPUS_OF_A_TASK.search(environment.get("SLURM_TRES_PER_TASK", ""))
    )
    return 0 if by_slurm or (count == 1 and chosen) else None


def identity(device: torch.device) -> str:
    """What tells a device from all others, on any host; empty where ranks may share it."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def refuse_shared(identities: Sequence[str]) -> None:
    """Refuse ranks that have the same device: their collectives would fail, or wait for each other for ever.

    Args:
        identities: of each rank's device, in the order of ranks.

    Raises:
        PreflightError: names the ranks; the same on all of them.
    """
    owners: dict[str, list[int]] = defaultdict(list)
    for rank, name in enumerate(identities):
        owners[name].append(rank)
    shared = [
        f"{', '.join(map(str, ranks))} ({name})" for name, ranks in owners.items() if name and len(ranks) > 1
    ]
    if shared:
        raise PreflightError(
            f"ranks with one device between them: {'; '.join(shared)}; expected one for each rank. Start fewer "
            "ranks on a host, or give each its own (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)"
        )


def _names_one(text: str) -> bool:
    return bool(text.strip()) and "," not in text
