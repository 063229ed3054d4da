"""What the machine itself can do: the largest product in each precision, a copy of memory, a read of a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from beit_dist.benches.contender import largest_product
from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.engine.precision import EMULATED, LOW, speeds


def measure(quick: bool) -> Iterator[Row]:
    """Products of square matrices, a copy on the device, and a file read through the page cache and past it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 512 if quick and device.type == "cpu" else largest_product(device)
    fast = [name for name, speed in speeds(device).items() if speed >= EMULATED]
    for name in ["fp32", *fast]:
        left, right = (torch.randn(side, side, device=device, dtype=LOW.get(name)) for _ in range(2))

        def product(left: torch.Tensor = left, right: torch.Tensor = right) -> None:
            torch.mm(left, right)
            wait(device)

        taken = in_turn({"torch": product}, 5)["torch"]
        yield row("ceilings", f"product of {side}²", name, [2e-12 * side**3 / each for each in taken], "TFLOP/s")

    size = (1 << 24) if quick else (1 << 31) if device.type == "cuda" else (1 << 28)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        wait(device)

    taken = in_turn({"torch": copy}, 5)["torch"]
    yield row("ceilings", "copy, read and written", device.type, [2e-9 * size / each for each in taken], "GB/s")
    yield from _files(size if device.type == "cpu" else 1 << 28)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _files(size: int) -> Iterator[Row]:
    buffer = bytearray(1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())

        def read(forget: bool = False) -> None:
            with path.open("rb", buffering=0) as file:
                if forget:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.readinto(buffer):
                    pass

        for who, taken in in_turn({"from memory": read, "from the disk": lambda: read(True)}, 3).items():
            yield row("ceilings", "file", who, [1e-9 * size / each for each in taken], "GB/s")
