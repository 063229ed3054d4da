"""The manifest commits a data set: what its shards hold, how large they are, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from beit_dist.errors import AccessError, DataError, StorageError, UserError
from beit_dist.shards.sample import MAX_VIEWS, SampleLayout
from beit_dist.storage.access import Access
from beit_dist.storage.opening import as_place
from beit_dist.storage.place import Place

FORMAT = "beit_dist token shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
HELD_OUT_NAME = "held-out"
"""Folder of a data set in which its held-out images lie, a data set of their own."""

_SHARD_NAME = re.compile(r"v(\d{2})/shard-\d{6,}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_name(view: int, index: int) -> str:
    """Name of a shard below the data set's folder, with ``/`` on every system."""
    return f"v{view:02d}/shard-{index:06d}.tar"


@dataclass(frozen=True)
class ShardInfo:
    """One shard file as the manifest lists it; ``name`` is relative to the data set's folder."""

    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: written last, it commits a data set. Its own sha256 is the data set's digest.

    Args:
        tokenizer: digest of the tokenizer that made the tokens.
        views: augmented versions of each image, each a shard sequence of its own.
        write_seed: seed of the source order and of crops, flips and jitter.
        rejected: images left out, because some view of them could not be made.
        shards: of all views, view 0 first.

    Raises:
        DataError: the parts contradict one another.
    """

    layout: SampleLayout
    tokenizer: str
    views: int
    write_seed: int
    rejected: int
    shards: tuple[ShardInfo, ...]

    def __post_init__(self) -> None:
        _expect(
            _SHA256.fullmatch(self.tokenizer) is not None, "tokenizer", self.tokenizer, "64 hexadecimal digits"
        )
        _expect(1 <= self.views <= MAX_VIEWS, "views", self.views, f"1 to {MAX_VIEWS}")
        _expect(0 <= self.write_seed < 2**63, "write_seed", self.write_seed, "0 to 2**63 - 1")
        _expect(self.rejected >= 0, "rejected", self.rejected, "0 or more")
        _expect(len(self.shards) > 0, "shards", "none", "at least one shard in each view")
        for shard in self.shards:
            _expect(
                _SHARD_NAME.fullmatch(shard.name) is not None, "shard name", shard.name, "v00/shard-000000.tar"
            )
            _expect(shard.samples > 0, f"{shard.name} samples", shard.samples, "1 or more")
            size = self.layout.shard_bytes(shard.samples)
            _expect(shard.bytes == size, f"{shard.name} bytes", shard.bytes, f"{size} for this number of samples")
            _expect(
                _SHA256.fullmatch(shard.sha256) is not None, f"{shard.name} sha256", shard.sha256, "64 hex digits"
            )
        names = [shard.name for shard in self.shards]
        expected = [f"v{view:02d}/{name[4:]}" for view in range(self.views) for name in names[: self._per_view]]
        fits = names == expected and names == sorted(set(names), key=lambda name: (name[:3], len(name), name))
        _expect(fits, "shards", ", ".join(names[:8]), f"the same ascending names in each of {self.views} views")
        first = [shard.samples for shard in self.view_shards(0)]
        for view in range(1, self.views):
            counts = [shard.samples for shard in self.view_shards(view)]
            _expect(counts == first, f"samples of view {view}", counts[:8], f"those of view 0, {first[:8]}")

    @property
    def _per_view(self) -> int:
        return len(self.shards) // self.views

    @cached_property
    def samples(self) -> int:
        """Samples of one view; every view has the same."""
        return sum(shard.samples for shard in self.view_shards(0))

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical manifest: the identity of the data set."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def view_shards(self, view: int) -> tuple[ShardInfo, ...]:
        """The shards of one view in order."""
        return self.shards[view * self._per_view : (view + 1) * self._per_view]

    def to_bytes(self) -> bytes:
        """The canonical file: fixed field order, one shard a line. No time, host, credential or path."""
        layout = self.layout
        fields = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "image_size": layout.image_size,
            "patch_size": layout.patch_size,
            "grid": [layout.grid, layout.grid],
            "vocabulary": layout.vocabulary,
            "tokenizer": self.tokenizer,
            "views": self.views,
            "write_seed": self.write_seed,
            "rejected": self.rejected,
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items()]
        shards = ",\n".join(json.dumps(asdict(shard)) for shard in self.shards)
        return f'{{\n{"".join(lines)}"shards": [\n{shards}\n]\n}}\n'.encode("ascii")

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Read and validate a manifest.

        Args:
            raw: the file's content.
            where: its path, for messages.

        Raises:
            DataError: not a manifest, of another version, incomplete, contradictory, or edited.
        """
        try:
            manifest = cls._parse(raw)
        except UserError as error:
            raise DataError(f"{where}: {error}") from None
        if manifest.to_bytes() != raw:
            raise DataError(
                f"{where}: got a manifest in another form, expected exactly the bytes that beit shards writes: "
                "the data set's digest depends on them. Undo the edit, or write it again: beit shards --finish"
            )
        return manifest

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"got invalid JSON ({error}), expected a manifest of token shards") from None
        got = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
        _expect(got == FORMAT, "format", got, repr(FORMAT))
        version = fields.get("version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"version: got {version!r}, expected {FORMAT_VERSION}. Use the release that wrote the shards."
            )
        numbers = ("image_size", "patch_size", "vocabulary", "views", "write_seed", "rejected")
        for name in numbers:
            _expect(type(fields.get(name)) is int, name, fields.get(name), "an integer")
        _expect(isinstance(fields.get("tokenizer"), str), "tokenizer", fields.get("tokenizer"), "a digest")
        layout = SampleLayout(fields["image_size"], fields["patch_size"], fields["vocabulary"])
        grid = [layout.grid, layout.grid]
        _expect(fields.get("grid") == grid, "grid", fields.get("grid"), f"{grid} for this image and patch size")
        listed = fields.get("shards")
        _expect(isinstance(listed, list), "shards", type(listed).__name__, "a list")
        return cls(
            layout=layout,
            tokenizer=fields["tokenizer"],
            views=fields["views"],
            write_seed=fields["write_seed"],
            rejected=fields["rejected"],
            shards=tuple(_parse_shard(entry) for entry in listed),
        )


def load_manifest(where: str | os.PathLike[str] | Place, access: Access | None = None) -> Manifest:
    """The manifest of a data set.

    Args:
        where: the data set's folder: a path, a URL, or the place itself.
        access: how a URL is reached.

    Raises:
        DataError: there is none, or it is not valid.
        StorageError: the store does not answer, or refuses.
    """
    place = as_place(where, access)
    try:
        raw = place.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{place}/{MANIFEST_NAME}: not found, so the data set is missing or incomplete. Name the folder that "
            "beit shards wrote to. If its workers are done, run beit shards --finish"
        ) from None
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{place}/{MANIFEST_NAME}: cannot be read ({error.strerror or error})") from None
    return Manifest.from_bytes(raw, f"{place}/{MANIFEST_NAME}")


def load_held_out(where: str | os.PathLike[str] | Place, access: Access | None = None) -> Manifest | None:
    """The manifest of a data set's held-out images; None if it has none.

    Args:
        where: the data set's folder: a path, a URL, or the place itself.
        access: how a URL is reached.

    Raises:
        DataError: it is not valid.
        StorageError: the store does not answer.
    """
    place = as_place(where, access) / HELD_OUT_NAME
    try:
        if not place.exists(MANIFEST_NAME):
            return None
    except AccessError:  # what S3 says of a missing file to those who may not list
        return None
    return load_manifest(place)


def check_shard_files(
    where: str | os.PathLike[str] | Place, manifest: Manifest, access: Access | None = None
) -> None:
    """Compare the size of every shard file with the manifest: fast enough for every start of a run.

    In a store the sizes come from its lists of files.

    Args:
        where: the data set's folder: a path, a URL, or the place itself.
        access: how a URL is reached.

    Raises:
        DataError: names each missing or wrongly sized file (the first 20).
        StorageError: the store does not answer, refuses, or sends whole files although a part was requested.
    """
    place = as_place(where, access)
    try:
        sizes = place.sizes([shard.name for shard in manifest.shards])
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error})") from None
    faults = []
    for shard in manifest.shards:
        size = sizes.get(shard.name)
        if size is None:
            faults.append(f"{shard.name}: not found")
        elif size != shard.bytes:
            faults.append(f"{shard.name}: got {size} bytes, expected {shard.bytes}")
    if faults:
        more = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
        listed = "\n  ".join([*faults[:20], *more])
        raise DataError(
            f"{place}: {len(faults)} of {len(manifest.shards)} shards are missing or damaged:\n  {listed}\n"
            "Copy them again, or make them again with beit shards. beit check lists what is wrong."
        )
    if manifest.shards and str(place).startswith("http"):
        try:  # a web server that sends whole files is found out now, and not when all ranks have started
            place.read_range(manifest.shards[0].name, 0, 1)
        except StorageError:
            raise
        except (OSError, EOFError) as error:
            raise DataError(f"{place}: cannot be read ({error})") from None


def _expect(holds: bool, field: str, got: object, expected: str) -> None:
    if not holds:
        raise DataError(f"{field}: got {got!r}, expected {expected}")


def _parse_shard(entry: Any) -> ShardInfo:
    types = {"name": str, "bytes": int, "samples": int, "sha256": str}
    complete = isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in types.items())
    _expect(complete, "shards", entry, f"entries with {', '.join(types)}")
    return ShardInfo(*(entry[name] for name in types))
