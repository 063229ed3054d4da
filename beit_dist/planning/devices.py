"""What the devices can do: datasheet figures with their source, and for a CPU what was measured here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from beit_dist.engine.durations import counted
from beit_dist.engine.precision import LOW
from beit_dist.engine.preflight import free_host_memory
from beit_dist.errors import ConfigError

GIB = 2**30
GB = 1e9
USABLE = 0.9
"""Share of a device's memory that a plan fills; the rest is for the context of CUDA, NCCL and gaps between
allocations. Assumed."""


@dataclass(frozen=True)
class Figure:
    """A number, and where it comes from."""

    value: float
    source: str
    """Begins with ``datasheet``, ``measured``, ``assumed`` or ``given``."""


@dataclass(frozen=True)
class Device:
    """One GPU, or the cores that a rank has on a CPU, and what connects it."""

    name: str
    memory: float
    """Bytes."""
    memory_rate: float
    """Bytes a second, reading or writing."""
    peaks: Mapping[str, float]
    """Dense FLOP/s by precision."""
    link: float
    """Bytes a second, in one direction, from a device to the others of its node."""
    network: float
    """Bytes a second, in one direction, from a node to the others."""
    to_host: float
    """Bytes a second from its memory to the host's."""
    watts: float
    """Most power of a device; 0 if unknown."""
    source: str
    """Of these figures."""

    @property
    def is_cpu(self) -> bool:
        """Whether its memory is the host's."""
        return self.name == "cpu"

    @property
    def usable(self) -> float:
        """Bytes that a plan fills."""
        return USABLE * self.memory


_HOPPER = {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12}
"""NVIDIA H100 Tensor Core GPU datasheet, SXM5: dense, half of the figures with sparsity. fp32 without TF32, which
torch leaves off by default."""

GPUS = {
    "h100": Device(
        name="h100",
        memory=80 * GIB,
        memory_rate=3350 * GB,
        peaks=_HOPPER,
        link=450 * GB,
        network=400 * GB,
        to_host=64 * GB,
        watts=700,
        source="datasheet: H100 SXM5 80 GB; NVLink 4, PCIe 5 x16; network of a DGX H100, 8 × 400 Gb/s",
    ),
    "h200": Device(
        name="h200",
        memory=141 * GB,
        memory_rate=4800 * GB,
        peaks=_HOPPER,
        link=450 * GB,
        network=400 * GB,
        to_host=64 * GB,
        watts=700,
        source="datasheet: H200 SXM 141 GB; NVLink 4, PCIe 5 x16; network of a DGX H200, 8 × 400 Gb/s",
    ),
    "a100": Device(
        name="a100",
        memory=80 * GIB,
        memory_rate=2039 * GB,
        peaks={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
        link=300 * GB,
        network=200 * GB,
        to_host=32 * GB,
        watts=400,
        source="datasheet: A100 SXM4 80 GB; NVLink 3, PCIe 4 x16; network of a DGX A100, 8 × 200 Gb/s",
    ),
}
CPU = "cpu"
_SIDE = 1024
_TRIES = 8
_LONG = 0.5
"""Seconds of a product after which there is no other try."""
_CPU_LINK = 0.8 * GB
"""An all-reduce of 100 MB by gloo between two processes of one host, AMD EPYC, 2 cores: 0.8 GB/s."""
_CPU_NETWORK = 1.25 * GB
"""Ten-gigabit Ethernet. Assumed."""
_CPU_COPY = 17 * GB
"""Copying the state of base, 1.1 GB in 0.063 s (docs/performance.md)."""
_COPIED = 2**24
"""Values of a copy that tells the rate of the memory: more than caches hold."""


def device_named(name: str, per_node: int, network: float | None = None) -> Device:
    """The device of ``--gpu``.

    Args:
        name: one of ``GPUS``, or ``cpu``: measured here, by products of matrices.
        per_node: ranks that share a host; on a CPU they share its cores and memory.
        network: bytes a second of a node, in place of the usual.

    Raises:
        ConfigError: there is none of this name.
    """
    if name == CPU:
        found = _this_cpu(per_node)
    elif name in GPUS:
        found = GPUS[name]
    else:
        raise ConfigError("--gpu", name, f"one of {', '.join([*GPUS, CPU])}")
    return found if network is None else replace(found, network=network)


def known_gpu(name: str) -> Device | None:
    """The GPU that a driver calls so; None for one whose peak is another or not known.

    The cards for PCIe that are called H100 and H200 reach less than those on SXM boards, and A100 the same.
    """
    if "PCIe" not in name and "NVL" not in name:
        for key in ("h100", "h200"):
            if key.upper() in name:
                return GPUS[key]
    return GPUS["a100"] if "A100" in name else None


def product_rate(precision: str) -> float:
    """FLOP/s of a product of matrices in this precision here, with torch's threads: the best of some tries.

    By processor time: what an idle machine does, though other programs may run beside it now.
    """
    x = torch.ones(_SIDE, _SIDE, dtype=LOW.get(precision, torch.float32))
    best = float("inf")
    for _ in range(_TRIES):
        began = time.process_time()
        torch.mm(x, x)
        best = min(best, (time.process_time() - began) / torch.get_num_threads())
        if best > _LONG:  # bf16 on a processor without units for it
            break
    return 2 * _SIDE**3 / best


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy in this machine's memory with torch's threads."""
    source = torch.ones(_COPIED)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_TRIES):
        began = time.process_time()
        target.copy_(source)
        best = min(best, (time.process_time() - began) / torch.get_num_threads())
    return 2 * source.nbytes / best


def _this_cpu(per_node: int) -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    share = min(1.0, cores / (per_node * threads))
    peaks = {precision: share * product_rate(precision) for precision in ("fp32", "bf16")}
    return Device(
        name=CPU,
        memory=(free_host_memory() or 8 * GIB) / per_node,
        memory_rate=share * copy_rate(),
        peaks={**peaks, "fp16": peaks["bf16"]},
        link=_CPU_LINK,
        network=_CPU_NETWORK,
        to_host=_CPU_COPY / per_node,
        watts=0,
        source=f"measured here: {_SIDE}² products, {counted(threads, 'thread')} a rank, "
        f"{counted(cores, 'core')} for {counted(per_node, 'rank')}",
    )
