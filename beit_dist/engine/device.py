"""What ``--device`` stands for."""

from __future__ import annotations

import os
import resource
import sys

import torch

from beit_dist.errors import ConfigError

_KIBI = 1 if sys.platform == "darwin" else 1024
"""Unit in which the system counts a process's memory (getrusage(2))."""
_EXPECTED = "auto, cpu, cuda or cuda:N"
_HERE, _NO_GPU = "a device of this machine", "PyTorch finds no such GPU here: use cpu or auto."


def device_of(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` stands for.

    Raises:
        ConfigError: it is another word, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = _parsed(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device", name, "a device of this machine", "PyTorch finds no GPU here: use cpu or auto."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError("--device", name, f"cuda:N with N below {torch.cuda.device_count()}, on this machine")
    return device


def choose_accelerator(name: str, world: int) -> None:
    """Have DeepSpeed take a device; to be called before it is imported, and before a GPU is used.

    ``auto`` is a GPU if there is one, unless ``DS_ACCELERATOR`` says otherwise. ``cuda:N`` hides the other GPUs.

    Args:
        world: the number of ranks.

    Raises:
        ConfigError: it is another word, there is no such device, or several ranks would share it.
    """
    device = None if name == "auto" else _parsed(name)
    if device is not None and device.type == "cuda" and device.index is not None:
        if world > 1:
            raise ConfigError("--device", name, f"cuda for {world} ranks", "Each rank takes a GPU of its own.")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(device.index + 1)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[device.index :][:1])
    present = torch.cuda.is_available()
    if device is not None and device.type == "cuda" and not present:
        raise ConfigError(
            "--device", name, "a device of this machine", "PyTorch finds none there: use cpu or auto."
        )
    if device is not None:
        os.environ["DS_ACCELERATOR"] = device.type
    elif not present:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at once: of a GPU's memory in tensors, on a CPU in all."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _KIBI * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _parsed(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise ConfigError("--device", name, _EXPECTED) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("--device", name, _EXPECTED)
    return device
