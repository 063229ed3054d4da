"""Writing a rank's file of fragments: safetensors, streamed, with checksums beside it; finding damage."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from beit_dist.checkpoints.image import FileImage
from beit_dist.checkpoints.layout import role_digests
from beit_dist.errors import StorageError
from beit_dist.storage.checksums import crc32 as crc32_of
from beit_dist.storage.place import Place

CHUNK = 4 << 20
"""Bytes under one crc32: what a range read must fetch to check itself."""
_BLOCK = 16 << 20  # bytes handed to the file at once


def write_fragments(folder: Place, rank: int, image: FileImage) -> None:
    """Write ``rank-XXXXX.safetensors`` and then, last, ``rank-XXXXX.json`` with its checksums; both durable.

    The slowest of three things decides how long it takes, if there are cores for them: the disk, sha256, and the
    checksums. None of them holds the interpreter's lock for long, so other threads run meanwhile.
    """
    name = f"rank-{rank:05d}"
    with ThreadPoolExecutor(2) as beside:
        sha256 = beside.submit(hashlib.sha256, image.bytes)
        checksums = beside.submit(_checksums, image)
        with folder.writing(f"{name}.safetensors") as file:
            for low in range(0, len(image.bytes), _BLOCK):
                file.write(image.bytes[low : low + _BLOCK])
    crc32, digests = checksums.result()
    record = {
        "file": f"{name}.safetensors",
        "bytes": len(image.bytes),
        "sha256": sha256.result().hexdigest(),
        "chunk": CHUNK,
        "crc32": crc32,
        "state_digests": digests,
        "fragments": [[f.parameter, f.role, f.start, f.length] for f in image.fragments],
    }
    folder.write(f"{name}.json", json.dumps(record).encode())


def _checksums(image: FileImage) -> tuple[list[int], dict[str, int]]:
    """crc32 of each chunk, and the digest of each role."""
    crc32 = [crc32_of(image.bytes[low : low + CHUNK]) for low in range(0, len(image.bytes), CHUNK)]
    return crc32, role_digests(image.fragments)


def write_copy(folder: Place, name: str, source: BinaryIO) -> dict[str, Any]:
    """Write a file of another kind into a checkpoint; its entry for the manifest."""
    sha256, size = hashlib.sha256(), 0
    with folder.writing(name) as file:
        while block := source.read(CHUNK):
            sha256.update(block)
            size += file.write(block)
    return {"file": name, "bytes": size, "sha256": sha256.hexdigest()}


def file_fault(folder: Place, name: str, size: int, sha256: str) -> str:
    """What is wrong with a file that should have this size and digest; empty if nothing is wrong.

    Raises:
        StorageError: the store does not answer, which says nothing about the file.
        PermissionError: reading is not allowed, which says nothing either.
    """
    digest = hashlib.sha256()
    try:
        got = folder.size(name)
        if got != size:
            return f"{name} has {got} bytes, expected {size}"
        for piece in folder.chunks(name):
            digest.update(piece)
    except (StorageError, PermissionError):
        raise
    except (OSError, EOFError) as error:
        return f"{name}: {getattr(error, 'strerror', None) or error}"
    return "" if digest.hexdigest() == sha256 else f"{name} has a sha256 that differs from the manifest"
