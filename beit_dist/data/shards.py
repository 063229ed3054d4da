"""The shard format: where every byte of a sample lies, how it is written, and the manifest that commits it all.

A shard is a plain USTAR tar that ``tar`` and ``webdataset`` open. Each sample is three members of constant size
(json, patches, tokens), so sample i starts at ``i · stride`` and can be read by position, without an index.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from beit_dist.errors import ConfigError, DataError, SampleError, UserError

FORMAT = "beit_dist token shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

JSON_BYTES = 512
"""Size of the json member; what does not fit is cut (see :func:`encode_notes`)."""
BLOCK = 512
"""Tar pads every header and member to this."""
RECORD = 10_240
"""Tar pads the whole file to this."""
NPY_HEADER = 128
MEMBERS = ("json", "patches.npy", "tokens.npy")
"""Extensions in the order in which webdataset's TarWriter writes them (sorted)."""
MAX_VIEWS = 100
MAX_SAMPLE_ID = 10**12 - 1

_KEY = re.compile(r"v(\d{2})-(\d{12})")
_KEY_BYTES = 16
_JSON_HEAD = re.compile(rb'\{"crc32":"([0-9a-f]{8})","key":"(v\d{2}-\d{12})",')
_JSON_HEAD_BYTES = 10 + 8 + 9 + _KEY_BYTES + 2
_SHARD_NAME = re.compile(r"v(\d{2})/shard-\d{6,}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Bytes = bytes | bytearray | memoryview
"""What the crc is taken of; a C-contiguous array serves as its ``memoryview``."""


@dataclass(frozen=True)
class SampleLayout:
    """All offsets of a sample, in bytes from its start; they follow from the shape alone.

    Args:
        image_size: side of the square image in pixels.
        patch_size: side of a patch in pixels; divides ``image_size``.
        vocabulary: number of visual tokens, 2 to 32,768 (tokens are int16).

    Raises:
        ConfigError: the numbers contradict one another.
    """

    image_size: int
    patch_size: int
    vocabulary: int

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ConfigError("patch_size", self.patch_size, f"a divisor of the image size ({self.image_size})")
        if not 2 <= self.vocabulary <= 2**15:
            raise ConfigError("vocabulary", self.vocabulary, "2 to 32768 visual tokens (they are stored as int16)")

    @cached_property
    def grid(self) -> int:
        """Patches, and visual tokens, along one side of the image."""
        return self.image_size // self.patch_size

    @cached_property
    def patches(self) -> int:
        return self.grid**2

    @cached_property
    def patch_bytes(self) -> int:
        """uint8 values of a patch."""
        return 3 * self.patch_size**2

    @cached_property
    def patches_nbytes(self) -> int:
        return self.patches * self.patch_bytes

    @cached_property
    def tokens_nbytes(self) -> int:
        return 2 * self.patches

    @cached_property
    def patches_npy_header(self) -> bytes:
        return _npy_header("|u1", (self.patches, self.patch_bytes))

    @cached_property
    def tokens_npy_header(self) -> bytes:
        return _npy_header("<i2", (self.grid, self.grid))

    @property
    def json_start(self) -> int:
        return BLOCK

    @cached_property
    def patches_start(self) -> int:
        """Start of the patch array, behind its npy header."""
        return self.json_start + JSON_BYTES + BLOCK + NPY_HEADER

    @cached_property
    def tokens_start(self) -> int:
        """Start of the token array, behind its npy header."""
        patches_member = self.patches_start - NPY_HEADER
        return patches_member + _padded(NPY_HEADER + self.patches_nbytes, BLOCK) + BLOCK + NPY_HEADER

    @cached_property
    def stride(self) -> int:
        """Bytes from one sample's start to the next one's."""
        return self.tokens_start - NPY_HEADER + _padded(NPY_HEADER + self.tokens_nbytes, BLOCK)

    @cached_property
    def member_starts(self) -> tuple[int, int, int]:
        """Where the data of the three :data:`MEMBERS` start; each has a tar header of 512 bytes before it."""
        return self.json_start, self.patches_start - NPY_HEADER, self.tokens_start - NPY_HEADER

    @cached_property
    def member_sizes(self) -> tuple[int, int, int]:
        return JSON_BYTES, NPY_HEADER + self.patches_nbytes, NPY_HEADER + self.tokens_nbytes

    def shard_bytes(self, samples: int) -> int:
        """Size of a shard file: samples, two closing blocks, padding to tar's record of 10,240 bytes."""
        return _padded(samples * self.stride + 2 * BLOCK, RECORD)


def sample_key(view: int, sample_id: int) -> str:
    """``v02-000000123456``: no dots, as webdataset takes all behind the first one for the extension."""
    if not (0 <= view < MAX_VIEWS and 0 <= sample_id <= MAX_SAMPLE_ID):
        raise ConfigError("sample key", (view, sample_id), f"a view below {MAX_VIEWS}, an id of 12 digits")
    return f"v{view:02d}-{sample_id:012d}"


def parse_key(key: str) -> tuple[int, int]:
    """(view, sample id) of a key; DataError if it is none of ours."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise DataError(f"sample key: got {key!r}, expected the form v02-000000123456")
    return int(match[1]), int(match[2])


def shard_name(view: int, index: int) -> str:
    """Name of a shard below the data set's folder, with ``/`` on every system."""
    return f"v{view:02d}/shard-{index:06d}.tar"


def sample_crc(key: str, patches: Bytes, tokens: Bytes) -> int:
    """crc32 over the key, the patch array and the token array, without npy headers."""
    return zlib.crc32(tokens, zlib.crc32(patches, zlib.crc32(key.encode("ascii"))))


def decode_head(layout: SampleLayout, head: memoryview | bytes) -> tuple[int, str]:
    """(crc32, key) from a sample's first bytes, up to its patch array, by slicing.

    Raises:
        DataError: these are not the first bytes of a sample of this layout.
    """
    if len(head) < layout.patches_start:
        raise DataError(f"sample head: got {len(head)} bytes, expected {layout.patches_start}")
    start = layout.json_start
    text = bytes(head[start : start + _JSON_HEAD_BYTES])
    match = _JSON_HEAD.fullmatch(text)
    if match is None:
        raise DataError(f'sample json: got {text!r}, expected {{"crc32":"xxxxxxxx","key":"v02-000000123456",...')
    npy = bytes(head[layout.patches_start - NPY_HEADER : layout.patches_start])
    if npy != layout.patches_npy_header:
        raise DataError(f"patches npy header: got {npy!r}, expected {layout.patches_npy_header!r}")
    return int(match[1], 16), match[2].decode("ascii")


class SampleNotes(NamedTuple):
    """What a sample's json tells people besides checksum and key."""

    source: str
    """Name of the image in its folder or tar."""
    label: str | None = None
    box: tuple[int, int, int, int] | None = None
    """Crop (left, top, right, bottom) in pixels of the upright source image."""
    flip: bool = False
    """Whether the crop was then mirrored left to right."""


def encode_notes(crc: int, key: str, notes: SampleNotes) -> bytes:
    """The json member: crc32 and key first, so that they can be sliced; padded with spaces to 512 bytes.

    A source name that does not fit loses its beginning. A label is never cut: it would become another label.

    Raises:
        DataError: the label alone does not fit.
    """
    rest: dict[str, Any] = {} if notes.label is None else {"label": notes.label}
    if notes.box is not None:
        rest |= {"box": list(notes.box), "flip": notes.flip}
    head = f'{{"crc32":"{crc:08x}","key":"{key}",'
    tail = "".join("," + _json_text({name: value})[1:-1] for name, value in rest.items()) + "}"
    free = JSON_BYTES - len(head) - len('"source":""') - len(_utf8(tail))
    if free < 0:
        raise DataError(f"label: got {notes.label!r}, expected a class name {-free} bytes shorter as JSON")
    text = f'{head}"source":"{_cut(notes.source, free)}"{tail}'
    return _utf8(text).ljust(JSON_BYTES, b" ")


def encode_sample(
    layout: SampleLayout, key: str, patches: NDArray[np.uint8], tokens: NDArray[np.int16], notes: SampleNotes
) -> dict[str, bytes]:
    """The three members' bytes by extension.

    Args:
        patches: uint8 (patches, patch_bytes), row-major, pixel order (y, x, channel) inside a patch.
        tokens: int16 (grid, grid), each in [0, vocabulary).

    Raises:
        DataError: a shape, type or token is not the layout's.
    """
    if patches.shape != (layout.patches, layout.patch_bytes) or patches.dtype != np.uint8:
        expected = f"uint8 {(layout.patches, layout.patch_bytes)}"
        raise DataError(f"{key} patches: got {patches.dtype} {patches.shape}, expected {expected}")
    if tokens.shape != (layout.grid, layout.grid) or tokens.dtype != np.int16:
        raise DataError(f"{key} tokens: got {tokens.dtype} {tokens.shape}, expected int16 {(layout.grid,) * 2}")
    if tokens.min() < 0 or tokens.max() >= layout.vocabulary:
        got = f"{tokens.min()}..{tokens.max()}"
        raise DataError(f"{key} tokens: got {got}, expected 0..{layout.vocabulary - 1}")
    patch_array, token_array = patches.tobytes(), tokens.astype("<i2", copy=False).tobytes()
    return {
        "json": encode_notes(sample_crc(key, patch_array, token_array), key, notes),
        "patches.npy": layout.patches_npy_header + patch_array,
        "tokens.npy": layout.tokens_npy_header + token_array,
    }


class WrittenShard(NamedTuple):
    """What :meth:`ShardWriter.close` found to have been written."""

    bytes: int
    samples: int
    sha256: str


class ShardWriter:
    """Writes one shard to an open binary file, which stays open: the caller makes it durable.

    Every member's offset is checked against the layout, since a tar writer may add headers of its own (for
    long names, large numbers or fractional times) that would silently break the constant stride.
    """

    def __init__(self, stream: BinaryIO, layout: SampleLayout) -> None:
        self.layout, self.samples = layout, 0
        self._sink = _HashingSink(stream)
        # The integer 0, not 0.0: tarfile writes a float time as an extra PAX header.
        self._tar = wds.TarWriter(self._sink, encoder=False, mtime=0)

    def write(self, key: str, patches: NDArray[np.uint8], tokens: NDArray[np.int16], notes: SampleNotes) -> None:
        """Append a sample; arguments and errors are those of :func:`encode_sample`."""
        members = encode_sample(self.layout, key, patches, tokens, notes)
        start = self.samples * self.layout.stride
        places = zip(MEMBERS, self.layout.member_starts, self.layout.member_sizes, strict=True)
        for member, data_start, size in places:
            self._tar.write({"__key__": key, member: members[member]})
            end, expected = self._tar.tarstream.offset, start + data_start + _padded(size, BLOCK)
            if end != expected:
                raise SampleError(
                    f"{key}.{member}: the tar writer ended it at byte {end}, expected {expected}. "
                    "This webdataset or Python writes other tar headers than the format allows."
                )
        self._tar.tarstream.members.clear()  # tarfile remembers each header written: megabytes by the shard's end
        self.samples += 1

    def close(self) -> WrittenShard:
        """Write the closing blocks; the stream stays open."""
        self._tar.close()
        expected = self.layout.shard_bytes(self.samples)
        if self._sink.written != expected:
            raise SampleError(f"shard: the tar writer wrote {self._sink.written} bytes, expected {expected}")
        return WrittenShard(self._sink.written, self.samples, self._sink.digest.hexdigest())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


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
            _expect(shard.bytes == size, f"{shard.name} bytes", shard.bytes, f"{size} by its samples")
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
                f"{where}: got a manifest in another form, expected the bytes that shard_tokens.py writes, as the "
                "data set's digest is taken from them. Undo the edit, or write it again: shard_tokens.py --finish"
            )
        return manifest

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        try:
            fields = json.loads(raw)
        except ValueError as error:
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


def load_manifest(root: str) -> Manifest:
    """The manifest of the data set in folder ``root``.

    Raises:
        DataError: there is none, or it is not valid.
    """
    if "://" in root:
        raise DataError(f"data: got {root!r}, expected a local folder. Copy the shards to a local disk first.")
    path = os.path.join(root, MANIFEST_NAME)
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: not found, so the data set is missing or not complete. Name the folder that shard_tokens.py "
            "wrote to; if its workers are done, run shard_tokens.py --finish"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return Manifest.from_bytes(raw, path)


def check_shard_files(root: str, manifest: Manifest) -> None:
    """Compare the size of every shard file with the manifest: fast enough for every start of a run.

    Raises:
        DataError: names each missing or wrongly sized file (the first 20).
    """
    faults: list[str] = []
    for shard in manifest.shards:
        try:
            size = os.stat(os.path.join(root, shard.name)).st_size
        except OSError as error:
            faults.append(f"{shard.name}: {error.strerror}")
            continue
        if size != shard.bytes:
            faults.append(f"{shard.name}: got {size} bytes, expected {shard.bytes}")
    if faults:
        more = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
        listed = "\n  ".join([*faults[:20], *more])
        raise DataError(
            f"{root}: {len(faults)} of {len(manifest.shards)} shards are missing or damaged:\n  {listed}\n"
            "Copy them again, or make them again with shard_tokens.py; check_shards.py tells more."
        )


class _HashingSink(io.RawIOBase):
    """Passes what the tar writer writes on to a file; counts and hashes it on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.written = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self.written += len(data)
        return len(data)


def _npy_header(descr: str, shape: Sequence[int]) -> bytes:
    """A version 1.0 npy header of 128 bytes, as NumPy writes it for the shapes in use."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode("ascii")
    magic = b"\x93NUMPY\x01\x00"
    length = NPY_HEADER - len(magic) - 2
    return magic + length.to_bytes(2, "little") + text.ljust(length - 1, b" ") + b"\n"


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _utf8(text: str) -> bytes:
    """UTF-8; half a surrogate pair (an undecodable byte of a file name) becomes its JSON escape."""
    return text.encode("utf-8", "backslashreplace")


def _cut(name: str, room: int) -> str:
    """The longest end of ``name`` whose JSON form, without quotes, takes at most ``room`` bytes."""
    kept: list[str] = []
    for character in reversed(name):
        piece = _json_text(character)[1:-1]
        room -= len(_utf8(piece))
        if room < 0:
            break
        kept.append(piece)
    return "".join(reversed(kept))


def _expect(holds: bool, field: str, got: object, expected: str) -> None:
    if not holds:
        raise DataError(f"{field}: got {got!r}, expected {expected}")


def _parse_shard(entry: Any) -> ShardInfo:
    types = {"name": str, "bytes": int, "samples": int, "sha256": str}
    complete = isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in types.items())
    _expect(complete, "shards", entry, f"entries with {', '.join(types)}")
    return ShardInfo(*(entry[name] for name in types))
