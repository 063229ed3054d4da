"""Writing a rank's file of fragments: safetensors, streamed, with checksums beside it; finding damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch

from beit_dist.engine.checkpoint.layout import Fragment, role_digests
from beit_dist.errors import StorageError
from beit_dist.storage.place import Place

CHUNK = 4 << 20
"""Bytes under one crc32: what a range read must fetch to check itself."""


def write_fragments(folder: Place, rank: int, fragments: Sequence[Fragment]) -> None:
    """Write ``rank-XXXXX.safetensors`` and then, last, ``rank-XXXXX.json`` with its checksums; both durable.

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
    with folder.writing(f"{name}.safetensors") as file, ThreadPoolExecutor(3) as beside:
        digests = beside.submit(role_digests, fragments)
        for part in itertools.chain([begin_of_file], parts):
            for low in range(0, len(part), CHUNK):
                block = part[low : low + CHUNK]
                hashed = [beside.submit(take, block) for take in checksums.takes]
                file.write(block)
                for one in hashed:
                    one.result()
    record = {
        "file": f"{name}.safetensors",
        "bytes": checksums.bytes,
        "sha256": checksums.sha256.hexdigest(),
        "chunk": CHUNK,
        "crc32": checksums.crc32,
        "state_digests": digests.result(),
        "fragments": [[f.parameter, f.role, f.start, f.length] for f in fragments],
    }
    folder.write(f"{name}.json", json.dumps(record).encode())


def write_copy(folder: Place, name: str, source: BinaryIO) -> dict[str, Any]:
    """Write a file of another kind into a checkpoint; its entry for the manifest."""
    sha256, size = hashlib.sha256(), 0
    with folder.writing(name) as file:
        while block := source.read(CHUNK):
            sha256.update(block)
            size += file.write(block)
    return {"file": name, "bytes": size, "sha256": sha256.hexdigest()}


class _Checksums:
    """sha256 of a stream of bytes, and crc32 of each of its chunks."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.crc32: list[int] = []
        self.bytes = 0
        self.takes = (self.sha256.update, self._update_crc32)
        """Each takes the next bytes, of any number, and may do so at the same time as the other."""

    def _update_crc32(self, block: memoryview) -> None:
        while len(block):
            taken = CHUNK - self.bytes % CHUNK
            if taken == CHUNK:
                self.crc32.append(0)
            self.crc32[-1] = zlib.crc32(block[:taken], self.crc32[-1])
            self.bytes += len(block[:taken])
            block = block[taken:]


def file_fault(folder: Place, name: str, size: int, sha256: str) -> str:
    """What is wrong with a file that should have this size and digest; empty when nothing is.

    Raises:
        StorageError: the store does not answer, which says nothing about the file.
    """
    digest = hashlib.sha256()
    try:
        got = folder.size(name)
        if got != size:
            return f"{name} has {got} bytes, expected {size}"
        for piece in folder.chunks(name):
            digest.update(piece)
    except StorageError:
        raise
    except (OSError, EOFError) as error:
        return f"{name}: {getattr(error, 'strerror', None) or error}"
    return "" if digest.hexdigest() == sha256 else f"{name} has another sha256 than the manifest says"


def _bytes_of(fragment: Fragment) -> memoryview:
    values = fragment.data.detach().to("cpu", torch.float32).contiguous()
    return values.numpy().data.cast("B")
