"""Ranks: the process groups, and what all ranks agree on each step."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from beit_dist.engine.ranks.devices import claim, device_index, identity
from beit_dist.engine.ranks.processors import gather_in_place
from beit_dist.errors import PreflightError


@dataclass(frozen=True)
class Ranks:
    """This process among all: ``rank`` of ``world``, ``local_rank`` on its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def init_process_groups(
    ranks: Ranks, timeout: timedelta, meeting: tuple[str, int, int | None] | None = None
) -> torch.device:
    """Join the other ranks through DeepSpeed and return this rank's device.

    Args:
        meeting: address and port where the ranks meet, and on rank 0 the descriptor of a socket that listens
            there, if there is one; a rank that is alone needs none.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    index = ranks.local_rank
    if accelerator.device_name() == "cpu":
        # This op serves inference only; leaving it on compiles C++ at every first start (needs g++ and ninja).
        # Reading the attribute would try out all ops, for half a second, so the dictionary is put there unread.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    else:
        index = check_devices(ranks, accelerator.device_count(), accelerator.device_name())
        accelerator.set_device(index)
    # DeepSpeed takes LOCAL_RANK for the index of the device.
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(index))
    if meeting is not None:
        os.environ.update(MASTER_ADDR=meeting[0], MASTER_PORT=str(meeting[1]))
    name, backend = accelerator.device_name(), accelerator.communication_backend_name()
    device = torch.device(name) if name == "cpu" else torch.device(name, index)
    if not dist.is_initialized():
        store = _store(ranks, timeout, meeting)
        claim(store, ranks.rank, ranks.world, identity(device))
        whole = dist.PrefixStore("group", store)  # type: ignore[attr-defined]  # documented, but not in __all__
        dist.init_process_group(backend, store=whole, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
    # DeepSpeed takes the group that is there.
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if backend == "gloo":
        gather_in_place(deepspeed.comm.comm.cdb)
    return device


def _store(ranks: Ranks, timeout: timedelta, meeting: tuple[str, int, int | None] | None) -> Any:
    """Where the ranks meet, by the variables of the environment; a rank that is alone needs no address.

    By address, a port that looked free may be taken by now. ``--ranks`` gives rank 0 one that is open.
    """
    if ranks.world == 1:
        return dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in __all__
    if meeting is not None and meeting[2] is not None:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, but not in __all__
            *meeting[:2], ranks.world, True, timeout, master_listen_fd=meeting[2]
        )
    else:
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=timeout))
    store.set_timeout(timeout)
    # torchrun may keep its store, with what was left in it, when it starts the ranks again.
    start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{ranks.world}"
    return dist.PrefixStore(start, store)  # type: ignore[attr-defined]  # documented, but not in __all__


def check_devices(ranks: Ranks, count: int, kind: str, environment: Mapping[str, str] = os.environ) -> int:
    """The index of this rank's device; a rank for which its host has none is refused before it joins the others.

    Raises:
        PreflightError: names the rank and its host.
    """
    index = device_index(ranks.local_rank, count, environment)
    if index is None:
        refused = PreflightError(
            f"rank {ranks.rank} on {socket.gethostname()}: {count} {kind} devices, expected one for each rank of "
            f"this host, at least {ranks.local_rank + 1}. Start fewer ranks there, or look for a device that is "
            "gone (nvidia-smi, CUDA_VISIBLE_DEVICES)."
        )
        refused.of_one_rank = True
        raise refused
    return index


class Agreement:
    """Small sums and exchanges over all ranks on the CPU, beside whatever the device does.

    The group is gloo's, of its own: nothing here synchronises with the accelerator, and every rank issues the
    same calls in the same order.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        self.ranks = ranks
        self._group = dist.new_group(backend="gloo", timeout=timeout) if ranks.world > 1 else None
        self._values = torch.zeros(0, dtype=torch.int64)
        self._work: Any = None

    def post(self, values: Sequence[int]) -> None:
        """Start summing ``values`` over the ranks; returns at once."""
        if self._work is not None:
            raise RuntimeError("post() before the result() of the one before")
        self._values = torch.tensor(list(values), dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._values, group=self._group, async_op=True)

    def result(self) -> list[int]:
        """The sums of the last ``post``, the same on every rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(value) for value in self._values]

    def sum(self, values: Sequence[int]) -> list[int]:
        """Sum ``values`` over the ranks and wait."""
        self.post(values)
        return self.result()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small ``value``, in the order of ranks."""
        gathered: list[Any] = [value]
        if self._group is not None:
            gathered = [None] * self.ranks.world
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's ``values``, as many on each, in the order of ranks; cheaper than ``gather``."""
        own = torch.tensor(list(values), dtype=torch.float64)
        if self._group is None:
            return [own.tolist()]
        gathered = [torch.empty_like(own) for _ in range(self.ranks.world)]
        dist.all_gather(gathered, own, group=self._group)
        return [numbers.tolist() for numbers in gathered]

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's small ``value``."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def store_of_ranks() -> Any:
    """The key-value store through which the ranks joined."""
    return dist.distributed_c10d._get_default_store()  # torch has no public name for it


def set_timeouts(timeout: timedelta) -> None:
    """Set how long the collectives issued from now on may take, in all groups of this rank."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)  # torch has no public name for it


def close_process_groups() -> None:
    """Leave all groups; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
