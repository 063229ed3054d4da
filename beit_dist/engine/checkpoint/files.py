"""Writing and reading a rank's file of fragments: safetensors, streamed, with checksums beside it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from beit_dist.durable import write_whole
from beit_dist.engine.checkpoint.layout import Fragment, fragment_key, role_digests
from beit_dist.errors import CheckpointError

CHUNK = 4 << 20
"""Bytes under one crc32: what a range read must fetch to check itself."""


def write_fragments(folder: Path, rank: int, fragments: Sequence[Fragment]) -> None:
    """Write ``rank-XXXXX.safetensors`` and then, last, ``rank-XXXXX.json`` with its checksums; both fsynced.

    Tensors go to the file one after another: the host needs memory for one of them, not for the state.
    """
    name = f"rank-{rank:05d}"
    table: dict[str, Any] = {}
    end = 0
    for fragment in fragments:
        begin, end = end, end + 4 * fragment.length
        table[fragment.key] = {"dtype": "F32", "shape": [fragment.length], "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    checksums = _Checksums()
    parts: Iterable[memoryview] = (_bytes_of(fragment) for fragment in fragments)
    begin_of_file = memoryview(struct.pack("<Q", len(header)) + header)
    # Hashing takes about as long as writing and, like it, lets other threads run: it goes on beside.
    with (folder / f"{name}.safetensors").open("wb") as file, ThreadPoolExecutor(2) as beside:
        digests = beside.submit(role_digests, fragments)
        for part in itertools.chain([begin_of_file], parts):
            for low in range(0, len(part), CHUNK):
                block = part[low : low + CHUNK]
                hashed = beside.submit(checksums.update, block)
                file.write(block)
                hashed.result()
        file.flush()
        os.fsync(file.fileno())
    record = {
        "file": f"{name}.safetensors",
        "bytes": checksums.bytes,
        "sha256": checksums.sha256.hexdigest(),
        "chunk": CHUNK,
        "crc32": checksums.crc32,
        "state_digests": digests.result(),
        "fragments": [[f.parameter, f.role, f.start, f.length] for f in fragments],
    }
    write_whole(folder / f"{name}.json", json.dumps(record).encode())


class _Checksums:
    """sha256 of a stream of bytes, and crc32 of each of its chunks."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.crc32: list[int] = []
        self.bytes = 0

    def update(self, block: memoryview) -> None:
        """Take the next bytes, of any number."""
        self.sha256.update(block)
        while len(block):
            taken = CHUNK - self.bytes % CHUNK
            if taken == CHUNK:
                self.crc32.append(0)
            self.crc32[-1] = zlib.crc32(block[:taken], self.crc32[-1])
            self.bytes += len(block[:taken])
            block = block[taken:]


def file_fault(path: Path, size: int, sha256: str) -> str:
    """What is wrong with a file that should have this size and digest; empty when nothing is."""
    try:
        got = path.stat().st_size
        if got != size:
            return f"{path.name} has {got} bytes, expected {size}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return "" if digest.hexdigest() == sha256 else f"{path.name} has another sha256 than the manifest says"


class FragmentReader:
    """Fills fragments from the files of a checkpoint, reading only the ranges they need."""

    def __init__(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        self._folder = folder
        self._stretches: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for record in records:
            for parameter, role, start, length in record["fragments"]:
                stretch = (start, start + length, record["file"])
                self._stretches.setdefault((parameter, role), []).append(stretch)
        self._open: dict[str, Any] = {}

    def fill(self, fragment: Fragment) -> None:
        """Copy the fragment's values into its ``data``.

        Raises:
            CheckpointError: the checkpoint does not cover it.
        """
        begin, end, filled = fragment.start, fragment.start + fragment.length, 0
        for start, stop, file in self._stretches.get((fragment.parameter, fragment.role), []):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                key = fragment_key(fragment.role, fragment.parameter, start)
                values = self._file(file).get_slice(key)[low - start : high - start]
                fragment.data[low - begin : high - begin].copy_(values)
                filled += high - low
        if filled != fragment.length:
            raise CheckpointError(
                f"{self._folder} holds {filled} of {fragment.length} values of {fragment.parameter} "
                f"({fragment.role}) from {fragment.start}"
            )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(str(self._folder / name), framework="pt")
        return self._open[name]


def _bytes_of(fragment: Fragment) -> memoryview:
    values = fragment.data.detach().to("cpu", torch.float32).contiguous()
    return values.numpy().data.cast("B")


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(CHUNK):
        digest.update(block)
    return digest
