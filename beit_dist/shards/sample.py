"""A sample as bytes: where its parts lie in a shard, and how its key and json are written and read back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import ConfigError, DataError
from beit_dist.storage.checksums import crc32

JSON_BYTES = 512
"""Size of the json member; what does not fit is cut (see :func:`encode_notes`)."""
BLOCK = 512
"""Tar pads every header and member to this."""
JSON_START = BLOCK
"""Where the json member's data are in a sample."""
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
_JSON_KEY_START = 10 + 8 + 9
_JSON_HEAD_BYTES = _JSON_KEY_START + _KEY_BYTES + 2

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
        return JSON_START

    @cached_property
    def patches_start(self) -> int:
        """Start of the patch array, behind its npy header."""
        return self.json_start + JSON_BYTES + BLOCK + NPY_HEADER

    @cached_property
    def tokens_start(self) -> int:
        """Start of the token array, behind its npy header."""
        patches_member = self.patches_start - NPY_HEADER
        return patches_member + padded(NPY_HEADER + self.patches_nbytes, BLOCK) + BLOCK + NPY_HEADER

    @cached_property
    def stride(self) -> int:
        """Bytes from one sample's start to the next one's."""
        return self.tokens_start - NPY_HEADER + padded(NPY_HEADER + self.tokens_nbytes, BLOCK)

    @cached_property
    def member_starts(self) -> tuple[int, int, int]:
        """Where the data of the three :data:`MEMBERS` start; each has a tar header of 512 bytes before it."""
        return self.json_start, self.patches_start - NPY_HEADER, self.tokens_start - NPY_HEADER

    @cached_property
    def member_sizes(self) -> tuple[int, int, int]:
        return JSON_BYTES, NPY_HEADER + self.patches_nbytes, NPY_HEADER + self.tokens_nbytes

    def shard_bytes(self, samples: int) -> int:
        """Size of a shard file: samples, two closing blocks, padding to tar's record of 10,240 bytes."""
        return padded(samples * self.stride + 2 * BLOCK, RECORD)


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


def sample_crc(key: str, patches: Bytes, tokens: Bytes) -> int:
    """crc32 over the key, the patch array and the token array, without npy headers."""
    return crc32(tokens, crc32(patches, crc32(key.encode("ascii"))))


def decode_head(layout: SampleLayout, head: memoryview | bytes) -> tuple[int, str]:
    """(crc32, key) from a sample's first bytes, up to its patch array, by slicing.

    Raises:
        DataError: these are not the first bytes of a sample of this layout.
    """
    if len(head) < layout.patches_start:
        raise DataError(f"sample head: got {len(head)} bytes, expected {layout.patches_start}")
    crc, key = decode_json_start(head[layout.json_start : layout.json_start + _JSON_HEAD_BYTES])
    npy = bytes(head[layout.patches_start - NPY_HEADER : layout.patches_start])
    if npy != layout.patches_npy_header:
        raise DataError(f"patches npy header: got {npy!r}, expected {layout.patches_npy_header!r}")
    return crc, key


def decode_json_start(start: memoryview | bytes) -> tuple[int, str]:
    """(crc32, key) from the first bytes of a json member.

    Raises:
        DataError: they are not in their place.
    """
    text = bytes(start[:_JSON_HEAD_BYTES])
    match = _JSON_HEAD.fullmatch(text)
    if match is None:
        raise DataError(f'json: got {text!r}, expected {{"crc32":"xxxxxxxx","key":"v02-000000123456",...')
    return int(match[1], 16), match[2].decode("ascii")


def checked_sample_id(
    layout: SampleLayout, head: memoryview, patches: memoryview, between: memoryview, tokens: memoryview, view: int
) -> int:
    """The id of a sample of which everything that training depends on is right.

    Args:
        layout: of the sample.
        head: its bytes up to the patch array.
        patches: that array's.
        between: those up to the token array.
        tokens: that array's.
        view: that the sample must be of.

    Raises:
        DataError: a checksum, key, view, npy header or token is wrong.
    """
    start = bytes(head[JSON_START : JSON_START + _JSON_HEAD_BYTES])
    key = start[_JSON_KEY_START : _JSON_KEY_START + _KEY_BYTES]
    number = key[4:]
    if (
        start == b'{"crc32":"%08x","key":"%b",' % (crc32(tokens, crc32(patches, crc32(key))), key)
        and key[:4] == b"v%02d-" % view
        and number.isdigit()
        and bytes(head[-NPY_HEADER:]) == layout.patches_npy_header
        and bytes(between[-NPY_HEADER:]) == layout.tokens_npy_header
        and np.maximum.reduce(np.frombuffer(tokens, np.uint16)) < layout.vocabulary
    ):
        return int(number)
    return _sample_id_in_steps(layout, head, patches, between, tokens, view)


def _sample_id_in_steps(
    layout: SampleLayout, head: memoryview, patches: memoryview, between: memoryview, tokens: memoryview, view: int
) -> int:
    """The same, three times as slow, with words for what is wrong."""
    stored, key = decode_head(layout, head)
    crc = sample_crc(key, patches, tokens)
    if crc != stored:
        raise DataError(f"{key}: got crc32 {crc:08x}, expected {stored:08x}")
    if between[-NPY_HEADER:] != layout.tokens_npy_header:
        raise DataError(f"{key}: got another tokens npy header than {layout.tokens_npy_header!r}")
    highest = int(np.frombuffer(tokens, np.uint16).max())  # as unsigned numbers, negative ones are high too
    if highest >= layout.vocabulary:
        raise DataError(f"{key}: got token {highest}, expected tokens below {layout.vocabulary}")
    key_view, sample_id = parse_key(key)
    if key_view != view:
        raise DataError(f"{key}: got a sample of view {key_view}, expected view {view}")
    return sample_id


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


def _npy_header(descr: str, shape: Sequence[int]) -> bytes:
    """A version 1.0 npy header of 128 bytes, as NumPy writes it for the shapes in use."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode("ascii")
    magic = b"\x93NUMPY\x01\x00"
    length = NPY_HEADER - len(magic) - 2
    return magic + length.to_bytes(2, "little") + text.ljust(length - 1, b" ") + b"\n"


def padded(size: int, unit: int) -> int:
    """``size`` rounded up to a multiple of ``unit``."""
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
