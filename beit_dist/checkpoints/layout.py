"""What a checkpoint folder is made of: fragments in rank files, and the sealed manifest that commits them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from beit_dist.errors import CheckpointError, StorageError
from beit_dist.storage.place import Place

if TYPE_CHECKING:  # a look at what is saved need not load it
    from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GIVEN_UP = "given_up_for"
"""In a manifest that commits nothing: a newer attempt, of this number, has taken the name before the older one."""
BAD = "BAD"
"""Marks a damaged checkpoint in a store, where a folder cannot be renamed."""
WEIGHT = "weight"
AVERAGE = "ema"
"""Exponential moving average of the weight; only in runs that keep one."""
BUFFER = "buffer"
"""What a model keeps besides its parameters, such as BatchNorm's running statistics; under the buffer's name. The
other roles are the optimizer's."""

_DIGEST_BLOCK = 1 << 18  # values at a time, so that the temporaries stay in the cache
_DIGEST_STEP = 2 * 0x9E3779B1  # twice 2³² / the golden ratio: its multiples spread evenly, and odd stays odd
_DIGEST_STEPS = np.arange(_DIGEST_BLOCK, dtype=np.uint32) * np.uint32(_DIGEST_STEP % 2**32)
_FOLDER = re.compile(r"step-(\d{8,})\.a(\d{4,})")


@dataclass(frozen=True)
class Fragment:
    """``data``, a 1-D fp32 view of live memory, is ``[start, start + length)`` of the flattened parameter."""

    parameter: str
    role: str
    start: int
    data: Tensor

    @property
    def length(self) -> int:
        """Number of values."""
        return self.data.numel()

    def digest(self) -> int:
        """A 64-bit number of the values and their places, such that those of all fragments add up (mod 2⁶⁴).

        The sum over a state is the same however it is cut into fragments. It shows mistakes, not malice: each
        value's bits are multiplied (mod 2³²) by an odd word made of parameter, role and index, and added up.
        """
        values = self.data.detach().cpu().contiguous().numpy().view(np.uint32)
        name = hashlib.sha256(f"{self.role}/{self.parameter}".encode()).digest()
        salt = int.from_bytes(name[:4], "little") | 1
        words, products = np.empty((2, min(_DIGEST_BLOCK, self.length)), dtype=np.uint32)
        total = 0
        for low in range(0, self.length, _DIGEST_BLOCK):
            block = values[low : low + _DIGEST_BLOCK]
            count = len(block)
            first = np.uint32((salt + (self.start + low) * _DIGEST_STEP) % 2**32)
            np.add(_DIGEST_STEPS[:count], first, out=words[:count])
            np.multiply(block, words[:count], out=products[:count])
            total += int(products[:count].sum(dtype=np.uint64))
        return total % 2**64

    @property
    def key(self) -> str:
        """Name of the tensor in a checkpoint file."""
        return fragment_key(self.role, self.parameter, self.start)


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint; ``manifest`` is empty when it cannot be read or fails its own checksum."""

    folder: Place
    step: int
    attempt: int
    manifest: dict[str, Any]


def fragment_key(role: str, parameter: str, start: int) -> str:
    """Name of a fragment's tensor in a checkpoint file."""
    return f"{role}/{parameter}@{start}"


def checkpoint_bytes(parameters: int, kept: int, averaged: bool) -> int:
    """Bytes of a checkpoint's tensors, all of fp32.

    Args:
        parameters: values of the weights.
        kept: values that the optimizer keeps of them.
        averaged: whether there is an average of the weights.
    """
    return 4 * (parameters * (1 + averaged) + kept)


def folder_name(step: int, attempt: int) -> str:
    """Name of the folder that an attempt writes a step's checkpoint to."""
    return f"step-{step:08d}.a{attempt:04d}"


def role_digests(fragments: Iterable[Fragment]) -> dict[str, int]:
    """The sum of the fragments' digests (mod 2⁶⁴) for each role among them."""
    found: dict[str, int] = {}
    for fragment in fragments:
        found[fragment.role] = (found.get(fragment.role, 0) + fragment.digest()) % 2**64
    return found


def summed(parts: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """Digests by role of all ranks added up, as a manifest has them: in hexadecimal."""
    total: dict[str, int] = {}
    for part in parts:
        for role, digest in part.items():
            total[role] = (total.get(role, 0) + digest) % 2**64
    return {role: f"{digest:016x}" for role, digest in sorted(total.items())}


def parse_folder_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint folder's name; None if it is not one."""
    found = _FOLDER.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def committed(folder: Place) -> list[Saved]:
    """All committed checkpoints in ``folder``, newest attempt first, then newest step.

    The attempt counts first: what an older one still commits after a newer one has begun is not what that one
    continues.
    """
    return list(newest_first(folder))


def newest_first(folder: Place) -> Iterator[Saved]:
    """What :func:`committed` returns, one by one: who asks for the newest reads no other's manifest."""
    named = [(name, entry) for entry in folder.list() if (name := parse_folder_name(entry))]
    for name, entry in sorted(named, key=lambda each: (each[0][1], each[0][0]), reverse=True):
        files = folder.list(entry)
        if MANIFEST in files and BAD not in files:
            manifest = read_manifest(folder / entry)
            if GIVEN_UP not in manifest:
                yield Saved(folder / entry, *name, manifest)


def kind_of(manifest: Mapping[str, Any]) -> str:
    """What kind of training a checkpoint is of; older versions did not say it, and had two kinds."""
    return str(manifest.get("kind") or ("tokenizer" if "codebook" in manifest else "pretraining"))


def rank_records(saved: Saved) -> list[dict[str, Any]]:
    """The ``rank-XXXXX.json`` of every rank: which fragments lie in which file."""
    names = [entry["file"] for entry in saved.manifest["files"] if entry["file"].endswith(".json")]
    try:
        return [json.loads(saved.folder.read(name)) for name in names]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{saved.folder} cannot be read: {error}") from None


def sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes, with the sha256 of its canonical JSON inside."""
    return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode()


def read_manifest(folder: Place) -> dict[str, Any]:
    """The manifest in ``folder`` if its seal holds; empty otherwise.

    Raises:
        StorageError: the store does not answer, which says nothing about the checkpoint.
        PermissionError: nor does this.
    """
    try:
        manifest: dict[str, Any] = json.loads(folder.read(MANIFEST))
        whole = manifest.pop("sha256") == _digest(manifest)
    except (StorageError, PermissionError):
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return {}
    return manifest if whole else {}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
