"""``--dry-run``: what a job would read, leave out and write, and how long it would take. Nothing is written."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from beit_dist.errors import SpaceError, printable
from beit_dist.images.left_out import LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.shards.manifest import HELD_OUT_NAME
from beit_dist.shards.sample import SampleNotes, sample_key
from beit_dist.shards.writer import ShardWriter
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.tokenizing.commits import read_commits
from beit_dist.tokenizing.decoding import Decoded, Recipe, decode_listed
from beit_dist.tokenizing.describing import Planned, aligned, size
from beit_dist.tokenizing.encoder import DVAEEncoder, Encoder
from beit_dist.tokenizing.freeze import check_same_sources
from beit_dist.tokenizing.job import Job
from beit_dist.tokenizing.parts import held_out_images
from beit_dist.tokenizing.starting import Options, Prepared, decoders_of, prepare
from beit_dist.tokenizing.sources import SOURCES_NAME, ListedImage, SourceList, read_listed

_MEASURED = 16
"""Images, evenly spread over the list."""
_KINDS = 6
_LONG = 5.0
"""Seconds; an encoder that takes so long for a batch is measured on one, the first, which is slower."""


class _Found(NamedTuple):
    """What would be read."""

    planned: Planned
    rows: list[tuple[str, str]]
    samples: list[ListedImage]
    """Some of the images."""
    made: int
    """Images whose shards an earlier start has made."""


def describe(options: Options, environment: Mapping[str, str], *, measure: bool) -> Iterator[str]:
    """Lines for a person.

    Args:
        options: of the job; ``index`` and ``count`` say whose part of the time is told.
        environment: where a scheduler says the same.
        measure: decode and encode a few images, and tell from that how long the job would take.

    Raises:
        UserError: what a start would refuse.
    """
    prepared = prepare(options, environment)
    if prepared.manifest is not None:
        yield f"{options.out}: complete, so there is nothing left to do"
        return
    found = _find(options, prepared.job)
    yield from aligned([*found.planned.rows(), *found.rows])
    left = 1 - found.made / found.planned.entries
    needed, free = int(found.planned.bytes * left), _free(options.out)
    if free is not None:
        yield from aligned([("space", f"{size(needed)} needed, {size(free)} free")])
    if measure:
        encoder = DVAEEncoder(prepared.model.to(prepared.device), options.precision)
        yield from aligned([("time", _measured(options, prepared, found, encoder, left))])
    else:
        yield from aligned([("time", "unknown; --measure estimates it from a few images")])
    if free is not None and needed > free:
        raise SpaceError(
            f"{options.out}: got {size(free)} of free space, expected {size(needed)}. Use another --out, or fewer "
            "--views"
        )


def _find(options: Options, job: Job) -> _Found:
    sources = expand_sources(options.images, options.access)
    rows, made = [], 0
    if options.out.exists(SOURCES_NAME):
        frozen = SourceList(options.out, options.shard_samples)
        header = frozen.header
        check_same_sources(header, sources, options.seed, options.out, options.sniff, options.held_out)
        made = _made(options.out, frozen)
        rows.append(("list", f"{options.out / SOURCES_NAME}, frozen earlier; {made:,} of its images are done"))
        entries, held_out = header.entries, header.held_out
        shards = sorted({number * frozen.shards // _MEASURED for number in range(_MEASURED)})
        samples = [listed for shard in shards for listed in frozen.read(shard)[:_MEASURED]]
    else:
        left_out = LeftOut()
        sniff = options.sniff and any(source.sniffs_on_request for source in sources)
        with tqdm(desc="listing images", unit=" images", disable=None) as bar:
            listed = list_images(sources, options.access, sniff=sniff, left_out=left_out, progress=bar.update)
        if not listed:
            raise no_images(f"--images {' '.join(options.images)}", left_out)
        entries, held_out = len(listed), held_out_images(options.held_out, len(listed))
        rows = [("kinds", _kinds([entry.text for entry in listed])), *(("", line) for line in left_out.lines())]
        samples = [ListedImage(number, sources[entry.source], entry, None) for number, entry in enumerate(listed)]
    picked = [samples[number * len(samples) // _MEASURED] for number in range(_MEASURED)]
    planned = Planned(options.out, job, options.images, options.tokenizer, entries, held_out)
    return _Found(planned, rows, list(dict.fromkeys(picked)), made)


def _made(out: Place, sources: SourceList) -> int:
    parts = [(out, sources)]
    if (held_out := sources.held_out()) is not None:
        parts.append((out / HELD_OUT_NAME, held_out))
    return sum(
        part.entries_of(shard)
        for place, part in parts
        for shard, commit in enumerate(read_commits(place, range(part.shards)))
        if commit is not None
    )


def _kinds(names: Sequence[str]) -> str:
    counts = Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in names)
    most = counts.most_common(_KINDS)
    rest = len(names) - sum(count for _, count in most)
    said = ", ".join(f"{count:,} {printable(kind)}" for kind, count in most)
    return said + (f", {rest:,} others" if rest else "")


def _free(out: Place) -> int | None:
    """Bytes that a local folder, which need not be there yet, can take."""
    if not out.is_local:
        return None
    path = Path(os.path.abspath(out.path))
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def _measured(options: Options, prepared: Prepared, found: _Found, encoder: Encoder, left: float) -> str:
    job, planned = prepared.job, found.planned
    decoders = max(1, decoders_of(options.decoders, planned.entries))
    began = time.perf_counter()
    decoded = [_decode(job, listed, options.access) for listed in found.samples]
    decode = (time.perf_counter() - began) / len(decoded)
    usable = [one for one in decoded if not one.reason]
    if not usable:
        return (
            f"unknown: none of {len(decoded)} images can be used ({decoded[0].listed.name}: {decoded[0].reason})"
        )
    encode = _encode_seconds(job, usable, encoder) * job.views / job.batch
    write = _write_seconds(job, usable)
    stages = (decode / decoders, encode, write)
    # Beside a GPU the slowest stage sets the pace; on a CPU all of them want the same cores.
    seconds = max(stages) if prepared.device.type == "cuda" else sum(stages)
    total = seconds * planned.entries * left / prepared.count
    share = f" for this worker's share of {prepared.count}" if prepared.count > 1 else ""
    lost = f", {len(decoded) - len(usable)} of which cannot be used" if len(usable) < len(decoded) else ""
    return (
        f"about {_in_words(total)}{share}: an image takes {1000 * decode:.1f} ms to read and decode "
        f"(in {decoders} process{'es' if decoders > 1 else ''}), {1000 * encode:.1f} ms to tokenize, "
        f"{1000 * write:.1f} ms to write; {len(decoded)} images looked at{lost}"
    )


def _decode(job: Job, listed: ListedImage, access: Access) -> Decoded:
    recipe = Recipe(job.views, job.image_size, job.token_size, job.patch_size, job.augment, job.seed)
    raw: bytes | ImageRejectedError
    try:
        raw = read_listed(listed, access)
    except ImageRejectedError as error:
        raw = error
    return decode_listed(recipe, listed, raw)


def _encode_seconds(job: Job, decoded: Sequence[Decoded], encoder: Encoder) -> float:
    """Of a batch; of a second one, as the first is slower."""
    batch = np.zeros((job.batch, job.token_size, job.token_size, 3), np.uint8)
    for row in range(job.batch):
        batch[row] = decoded[row % len(decoded)].views[0].token_image
    for _ in range(2):
        began = time.perf_counter()
        encoder(batch)
        seconds = time.perf_counter() - began
        if seconds > _LONG:
            break
    return seconds


def _write_seconds(job: Job, decoded: Sequence[Decoded]) -> float:
    """Of an image in all views, without the disk's part."""
    tokens = np.zeros((job.layout.grid, job.layout.grid), np.int16)
    with open(os.devnull, "wb") as nowhere:
        writer = ShardWriter(nowhere, job.layout)
        began = time.perf_counter()
        for one in decoded:
            for view, made in enumerate(one.views):
                writer.write(sample_key(view, one.listed.sample_id), made.image, tokens, SampleNotes(""))
        return (time.perf_counter() - began) / len(decoded)


def _in_words(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
