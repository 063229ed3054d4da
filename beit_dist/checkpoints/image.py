"""A rank's file of fragments as it will lie on the disk, in host memory.

The copy that a save is written from is laid out as the file itself, so nothing is put together while writing: the
disk, the hash and the checksums each go through the same memory at their own pace.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from beit_dist.checkpoints.layout import Fragment
from beit_dist.storage.direct import aligned_memory

_log = logging.getLogger(__name__)
_TOUCHED = 16 << 20  # bytes at a time
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device's context


class FileImage:
    """Memory for a file of these fragments; ``take`` fills it with their values.

    It is kept between saves: memory that the system has yet to find takes ten times as long to fill.

    Args:
        fragments: which values, of which parameters; their lengths decide the size.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        table: dict[str, Any] = {}
        end = 0
        for fragment in fragments:
            begin, end = end, end + 4 * fragment.length
            table[fragment.key] = {"dtype": "F32", "shape": [fragment.length], "data_offsets": [begin, end]}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % 64)
        header = struct.pack("<Q", len(header)) + header

        memory = aligned_memory(len(header) + end)
        self.bytes = memoryview(memory)[: len(header) + end]
        """The whole file."""
        self.bytes[: len(header)] = header
        self.fragments: list[Fragment] = []
        """The copies, in the order of the file."""
        offset = len(header)
        for fragment in fragments:
            copy = torch.frombuffer(memory, dtype=torch.float32, count=fragment.length, offset=offset)
            self.fragments.append(Fragment(fragment.parameter, fragment.role, fragment.start, copy))
            offset += 4 * fragment.length
        self._values = self.bytes[len(header) :]

    @classmethod
    def of(cls, fragments: Sequence[Fragment]) -> FileImage:
        """A file's image with the values of ``fragments`` as they are now."""
        image = cls(fragments)
        image.take(fragments)
        return image

    def fits(self, fragments: Sequence[Fragment]) -> bool:
        """Whether the memory is laid out for these fragments."""
        return [(f.key, f.length) for f in fragments] == [(f.key, f.length) for f in self.fragments]

    def find_memory(self) -> None:
        """Have the system find all the memory now, which is what takes long the first time it is filled."""
        for low in range(0, len(self._values), _TOUCHED):
            np.frombuffer(self._values[low : low + _TOUCHED], np.uint8).fill(0)  # torch would start threads for it

    def pin(self, device: torch.device) -> None:
        """Let a CUDA device copy into the memory directly; without that the copy is slower, and is still right.

        torch's own pinned memory comes in powers of two, which would cost up to twice the state.
        """
        address = torch.frombuffer(self.bytes, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(runtime.cudaHostRegister(address, len(self.bytes), _PORTABLE))
        if code != 0:
            _log.warning("checkpoint: the memory for copies cannot be pinned (CUDA error %d)", code)

    @torch.no_grad()
    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy the values of ``fragments``, which must fit; what the next step changes is not what is written."""
        for copy, fragment in zip(self.fragments, fragments, strict=True):
            copy.data.copy_(fragment.data, non_blocking=True)
        if any(fragment.data.is_cuda for fragment in fragments):
            torch.cuda.synchronize()
