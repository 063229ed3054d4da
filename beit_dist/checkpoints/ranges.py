"""Reading the parts of a checkpoint that a rank needs: whole chunks, each compared with its checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from beit_dist.checkpoints.layout import Fragment
from beit_dist.errors import CheckpointError, StorageError
from beit_dist.storage.checksums import crc32
from beit_dist.storage.place import Place

_GROUP = 8
"""Chunks of one request: 32 MiB, for which a store's first byte takes no longer than for one."""


class FragmentReader:
    """Fills fragments from the files of a checkpoint, reading only the chunks that hold them.

    Args:
        folder: the checkpoint.
        records: the content of each ``rank-XXXXX.json``.
    """

    def __init__(self, folder: Place, records: Sequence[Mapping[str, Any]]) -> None:
        self._folder = folder
        # (parameter, role) -> start and end of a stretch, the file it is in, and where in that its bytes begin
        self._stretches: dict[tuple[str, str], list[tuple[int, int, _ChunkedFile, int]]] = {}
        for record in records:
            file = _ChunkedFile(folder, record)
            # Fragments lie one behind the other; before them is the safetensors header.
            begin = record["bytes"] - 4 * sum(length for *_, length in record["fragments"])
            for parameter, role, start, length in record["fragments"]:
                self._stretches.setdefault((parameter, role), []).append((start, start + length, file, begin))
                begin += 4 * length

    def fill(self, fragment: Fragment) -> None:
        """Copy the fragment's values into its ``data``.

        Raises:
            CheckpointError: the checkpoint does not cover it, or a chunk is damaged.
        """
        begin, end, filled = fragment.start, fragment.start + fragment.length, 0
        for start, stop, file, offset in self._stretches.get((fragment.parameter, fragment.role), []):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                file.copy(offset + 4 * (low - start), fragment.data[low - begin : high - begin])
                filled += high - low
        if filled != fragment.length:
            raise CheckpointError(
                f"{self._folder} holds {filled} of {fragment.length} values of {fragment.parameter} "
                f"({fragment.role}) from {fragment.start}"
            )


class _ChunkedFile:
    """A file with a crc32 for each chunk. Keeps the last group: neighbours are mostly read one after another."""

    def __init__(self, folder: Place, record: Mapping[str, Any]) -> None:
        self._folder, self._name, self._size = folder, record["file"], int(record["bytes"])
        self._crc32: Sequence[int] = record["crc32"]
        self._bytes_of_group = _GROUP * int(record["chunk"])
        self._chunk = int(record["chunk"])
        self._group, self._first, self._held = -1, 0, bytearray()

    def copy(self, begin: int, values: Tensor) -> None:
        """Copy fp32 values that begin at byte ``begin`` into the 1-D ``values``, on whatever device."""
        direct = values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous()
        target = values if direct else torch.empty(values.shape, dtype=torch.float32)
        memory = target.numpy().data.cast("B")
        done = 0
        while done < len(memory):
            position = begin + done
            group = position // self._bytes_of_group
            taken = min(len(memory) - done, (group + 1) * self._bytes_of_group - position)
            self._hold(group, position, position + taken)
            inside = position - self._first
            memory[done : done + taken] = memoryview(self._held)[inside : inside + taken]
            done += taken
        if not direct:
            values.copy_(target)

    def _hold(self, group: int, begin: int, end: int) -> None:
        """Have the chunks of ``group`` that bytes ``begin`` to ``end`` lie in, checked."""
        if group == self._group and self._first <= begin and end <= self._first + len(self._held):
            return
        first = begin // self._chunk
        # What follows in the group is mostly wanted next.
        last = min(len(self._crc32), (group + 1) * _GROUP)
        self._group, self._first = -1, first * self._chunk
        size = min(self._size, last * self._chunk) - self._first
        if len(self._held) != size:
            self._held = bytearray(size)
        try:
            self._folder.read_into(self._name, self._first, memoryview(self._held))
        except (StorageError, PermissionError):
            raise
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self._folder}: {self._name} cannot be read: {error}") from None
        for number in range(first, last):
            low = (number - first) * self._chunk
            if crc32(memoryview(self._held)[low : low + self._chunk]) != self._crc32[number]:
                raise CheckpointError(
                    f"{self._folder}: {self._name} is damaged in the {self._chunk} bytes from "
                    f"{number * self._chunk}. Start again: the checkpoint before it is used."
                )
        self._group = group
