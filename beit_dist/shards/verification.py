"""Checking every byte of a data set against its manifest, and saying exactly what is wrong and where."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from beit_dist.errors import AccessError, DataError, StorageError
from beit_dist.shards.manifest import HELD_OUT_NAME, Manifest, ShardInfo
from beit_dist.shards.sample import (
    BLOCK,
    JSON_BYTES,
    MAX_SAMPLE_ID,
    MEMBERS,
    SampleLayout,
    SampleNotes,
    decode_json_start,
    encode_notes,
    parse_key,
    sample_crc,
)
from beit_dist.shards.statistics import Tally, problem_with
from beit_dist.storage.opening import as_place
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_stream

_log = logging.getLogger(__name__)

Progress = Callable[[int], None]
_READ = 1 << 20
_VIEW, _SHARD = re.compile(r"v\d{2}"), re.compile(r"[^.].*\.tar")


class Fault(NamedTuple):
    """One thing that is wrong, and where."""

    shard: str
    problem: str
    """What it is, with got and expected."""
    sample: int | None = None
    """Row in the shard."""
    key: str = ""
    offset: int | None = None
    """Byte in the shard file."""

    def __str__(self) -> str:
        where = [self.shard]
        if self.sample is not None:
            where.append(f"sample {self.sample}" + (f" ({self.key})" if self.key else ""))
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        return f"{', '.join(where)}: {self.problem}"


@dataclass
class Census:
    """What :func:`verify` read, as far as it is whole."""

    tally: Tally
    lowest: int = MAX_SAMPLE_ID + 1
    """Sample id."""
    highest: int = -1


class _Checked(NamedTuple):
    """One shard: what is wrong with it, its (row, sample id) as far as keys can be read, and its whole samples."""

    faults: list[Fault]
    ids: dict[int, int]
    tally: Tally | None = None


def verify(
    where: str | os.PathLike[str] | Place,
    manifest: Manifest,
    threads: int = 1,
    progress: Progress = lambda _: None,
    census: Census | None = None,
) -> Iterator[Fault]:
    """Every fault of the data set, shard by shard.

    Args:
        where: the data set's folder: a path, a URL, or the place itself.
        threads: shards that are read at once.
        progress: called with numbers of bytes read, from any thread.
        census: gets what the samples hold.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    place = as_place(where)
    yield from _unlisted(place, manifest)
    groups = list(zip(*(manifest.view_shards(view) for view in range(manifest.views)), strict=True))
    highest = -1
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda shards: _verify_group(place, manifest.layout, shards, progress), groups)
        for shards, (faults, ids, counted) in zip(groups, results, strict=True):
            yield from faults
            if census is not None and ids and counted is not None:
                census.tally += counted
                census.lowest = min(census.lowest, *ids.values())
                census.highest = max(census.highest, *ids.values())
            if ids and min(ids.values()) <= highest:
                row = min(ids, key=lambda row: ids[row])
                problem = (
                    f"sample id: got {ids[row]}, expected more than {highest}, the last id of the shards before"
                )
                yield Fault(shards[0].name, problem, row)
            highest = max(highest, *ids.values()) if ids else highest


def verify_with_held_out(
    place: Place,
    manifest: Manifest,
    held_out: Manifest | None,
    threads: int,
    progress: Progress,
    notes: list[str],
) -> Iterator[Fault]:
    """Every fault of a data set and of its held-out images, whose shards are named ``held-out/...``.

    Args:
        notes: gets what is wrong with the statistics of those that are whole.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    parts = [("", place, manifest)]
    if held_out is not None:
        parts.append((f"{HELD_OUT_NAME}/", place / HELD_OUT_NAME, held_out))
    read = []
    for prefix, where, of in parts:
        census, whole = Census(Tally.empty(of.layout)), True
        for fault in verify(where, of, threads, progress, census):
            whole = False
            yield fault._replace(shard=prefix + fault.shard)
        if whole and (problem := problem_with(where, of, census.tally)):
            notes.append(problem)
        read.append(census)
    if held_out is not None and read[1].lowest <= read[0].highest and read[0].lowest <= read[1].highest:
        ranges = [f"{census.lowest} to {census.highest}" for census in read]
        yield Fault(
            HELD_OUT_NAME,
            f"sample ids: got {ranges[1]}, expected none from {ranges[0]}, which are trained on: both may hold "
            "the same images. Write both from one list: beit shards --held-out",
        )


def _unlisted(place: Place, manifest: Manifest) -> Iterator[Fault]:
    known = {shard.name for shard in manifest.shards}
    try:
        views = filter(_VIEW.fullmatch, place.list())
        found = [f"{view}/{name}" for view in views for name in filter(_SHARD.fullmatch, place.list(view))]
    except (AccessError, PermissionError):  # web servers and buckets often give files and no lists
        _log.warning("%s: cannot be listed, so shards that are not in the manifest are not found", place)
        return
    for name in found:
        if name not in known:
            yield Fault(name, "not in the manifest, but readers that take every tar would read it")


def _verify_group(place: Place, layout: SampleLayout, shards: Sequence[ShardInfo], progress: Progress) -> _Checked:
    """The same shard of all views: each by itself, then their ids against view 0's."""
    checked = [_verify_shard(place, layout, view, shard, progress) for view, shard in enumerate(shards)]
    faults = [fault for one in checked for fault in one.faults]
    first = checked[0].ids
    for shard, (_, ids, _) in zip(shards[1:], checked[1:], strict=True):
        for row in sorted(ids.keys() & first.keys()):
            if ids[row] != first[row]:
                problem = f"sample id: got {ids[row]}, expected {first[row]} as in {shards[0].name}"
                faults.append(Fault(shard.name, problem, row))
    tally = Tally.empty(layout)
    for one in checked:
        if one.tally is not None:
            tally += one.tally
    return _Checked(faults, first, tally)


def _verify_shard(place: Place, layout: SampleLayout, view: int, shard: ShardInfo, progress: Progress) -> _Checked:
    try:
        size = place.size(shard.name)
        with open_stream(place, shard.name) as file:
            checked, digest = _read_shard(file, layout, view, shard, progress)
    except AccessError as error:  # the manifest could be read; S3 may say only this of a missing file
        return _Checked([Fault(shard.name, f"missing, or reading it is not allowed ({error})")], {})
    except StorageError:
        raise
    except FileNotFoundError:
        return _Checked([Fault(shard.name, "no such file")], {})
    except (OSError, EOFError) as error:  # at a URL a file that became shorter meanwhile is an EOFError
        reason = getattr(error, "strerror", None) or error
        return _Checked([Fault(shard.name, f"cannot be read ({reason})")], {})
    faults = checked.faults
    if size != shard.bytes:
        faults.insert(0, Fault(shard.name, f"size: got {size} bytes, expected {shard.bytes}"))
    if digest != shard.sha256:
        hint = "" if faults else "; all checksums inside are right, so a name, label or box in some json differs"
        faults.append(Fault(shard.name, f"sha256: got {digest}, expected {shard.sha256}{hint}"))
    return checked


def _read_shard(
    file: BinaryIO, layout: SampleLayout, view: int, shard: ShardInfo, progress: Progress
) -> tuple[_Checked, str]:
    digest = hashlib.sha256()
    faults: list[Fault] = []
    ids: dict[int, int] = {}
    tally = Tally.empty(layout)
    for row in range(shard.samples):
        raw = file.read(layout.stride)
        digest.update(raw)
        progress(len(raw))
        start = row * layout.stride
        if len(raw) < layout.stride:
            problem = f"cut short: got {len(raw)} bytes of the sample, expected {layout.stride}"
            faults.append(Fault(shard.name, problem, row, offset=start))
            break
        key = ""
        try:
            crc, key = decode_json_start(raw[layout.json_start : layout.json_start + JSON_BYTES])
            found_view, ids[row] = parse_key(key)
            if found_view != view:
                faults.append(Fault(shard.name, f"view: got {found_view}, expected {view}", row, key, start))
            problems = list(_sample_problems(layout, memoryview(raw), crc, key))
        except DataError as error:
            problems = [(layout.json_start, str(error))]
        if not problems:
            _count(tally, layout, memoryview(raw))
        faults += [Fault(shard.name, problem, row, key, start + offset) for offset, problem in problems]
    faults += _id_faults(shard, ids)
    rest = b"".join(iter(lambda: file.read(_READ), b""))
    digest.update(rest)
    progress(len(rest))
    if any(rest):
        offset = shard.samples * layout.stride + next(i for i, byte in enumerate(rest) if byte)
        faults.append(Fault(shard.name, "got data after the last sample, expected zeros", offset=offset))
    return _Checked(faults, ids, tally), digest.hexdigest()


def _count(tally: Tally, layout: SampleLayout, raw: memoryview) -> None:
    tokens = np.frombuffer(raw, "<i2", layout.patches, layout.tokens_start)
    patches = np.frombuffer(raw, np.uint8, layout.patches_nbytes, layout.patches_start)
    tally.add(tokens, patches.reshape(layout.patches, layout.patch_bytes))


def _id_faults(shard: ShardInfo, ids: dict[int, int]) -> Iterator[Fault]:
    for before, row in itertools.pairwise(sorted(ids)):
        if ids[row] <= ids[before]:
            yield Fault(
                shard.name, f"sample id: got {ids[row]}, expected more than {ids[before]}, the id before", row
            )


def _sample_problems(layout: SampleLayout, raw: memoryview, crc: int, key: str) -> Iterator[tuple[int, str]]:
    """(offset in the sample, what is wrong) of everything but the key's place in the data set."""
    places = zip(MEMBERS, layout.member_starts, layout.member_sizes, strict=True)
    ends = (*(start - BLOCK for start in layout.member_starts[1:]), layout.stride)
    for (member, start, size), end in zip(places, ends, strict=True):
        yield from _differences(
            raw, start - BLOCK, _tar_header(f"{key}.{member}", size), f"tar header of {member}"
        )
        yield from _differences(raw, start + size, bytes(end - start - size), f"padding of {member}")
    arrays = ((layout.patches_start, layout.patches_npy_header), (layout.tokens_start, layout.tokens_npy_header))
    for start, header in arrays:
        yield from _differences(raw, start - len(header), header, "npy header")
    yield from _json_problems(layout, raw, crc, key)
    patches = raw[layout.patches_start : layout.patches_start + layout.patches_nbytes]
    tokens = raw[layout.tokens_start : layout.tokens_start + layout.tokens_nbytes]
    got = sample_crc(key, patches, tokens)
    if got != crc:
        yield layout.patches_start, f"crc32 of key, patches and tokens: got {got:08x}, expected {crc:08x}"
    values = np.frombuffer(tokens, "<i2")
    wrong = np.flatnonzero((values < 0) | (values >= layout.vocabulary))
    if len(wrong):
        place, expected = int(wrong[0]), f"0 to {layout.vocabulary - 1}"
        problem = f"token {place}: got {values[place]}, expected {expected} ({len(wrong)} such tokens)"
        yield layout.tokens_start + 2 * place, problem


def _json_problems(layout: SampleLayout, raw: memoryview, crc: int, key: str) -> Iterator[tuple[int, str]]:
    start, size = layout.member_starts[0], layout.member_sizes[0]
    text = bytes(raw[start : start + size])
    try:
        fields: dict[str, Any] = json.loads(text)
        box = tuple(fields["box"]) if "box" in fields else None
        notes = SampleNotes(fields["source"], fields.get("label"), box, fields.get("flip", False))
        expected = encode_notes(crc, key, notes)
    except (ValueError, KeyError, TypeError, DataError) as error:
        yield start, f"json: got {text.rstrip()!r} ({error!r}), expected the form that the writer gives it"
        return
    yield from _differences(raw, start, expected, "json")


def _differences(raw: memoryview, start: int, expected: bytes, what: str) -> Iterator[tuple[int, str]]:
    """The first byte that differs from what must stand at ``start``."""
    got = bytes(raw[start : start + len(expected)])
    if got != expected:
        first = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
        yield start + first, f"{what}: got {got[first:][:24]!r}, expected {expected[first:][:24]!r}"


def _tar_header(name: str, size: int) -> bytes:
    """The header that webdataset's TarWriter writes for a member."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    info.uname = info.gname = "bigdata"
    return info.tobuf(tarfile.USTAR_FORMAT)
