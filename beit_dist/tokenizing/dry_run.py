"""``--dry-run``: what a job would read, leave out and write, and how long it would take. No shard is made."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from beit_dist.engine.durations import counted
from beit_dist.errors import DataError, SpaceError, printable
from beit_dist.images.left_out import LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.shards.manifest import HELD_OUT_NAME
from beit_dist.storage.place import Place
from beit_dist.tokenizing.commits import read_commits
from beit_dist.tokenizing.describing import Planned, Rows, aligned, size
from beit_dist.tokenizing.encoder import DVAEEncoder
from beit_dist.tokenizing.encoders import decoders_of_encoder
from beit_dist.tokenizing.freeze import check_same_sources
from beit_dist.tokenizing.job import Job
from beit_dist.tokenizing.measuring import Stage, measure_stages
from beit_dist.tokenizing.parts import held_out_images
from beit_dist.tokenizing.sources import SOURCES_NAME, ListedImage, SourceList
from beit_dist.tokenizing.starting import Options, Prepared, decoders_of, prepare

_MEASURED = 64
"""Images, evenly spread over the list."""
_KINDS = 6
_WAYS_OUT = {
    "decode": "Cores and --decoders help, --pixel-version 2 and --decoder simplejpeg",
    "encode": "GPUs and --encoders help, a larger --batch, and a --precision that the device is fast in",
    "write": "--encoders and a faster disk help",
    "cores": "More cores help, --pixel-version 2 and --decoder simplejpeg",
}
"""What to do about each limit."""


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
        measure: decode, encode and write a few images, and tell from that how long the job would take. What is
            written is removed.

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
    if free is not None and needed > free:
        raise SpaceError(
            f"{options.out}: got {size(free)} of free space, expected {size(needed)}. Use another --out, or fewer "
            "--views"
        )
    if measure:
        yield from aligned(_measured(options, prepared, found, needed))
    else:
        yield from aligned([("time", "unknown; without --no-measure it is estimated from a few images")])


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


def _measured(options: Options, prepared: Prepared, found: _Found, needed: int) -> Rows:
    job, encoders = prepared.job, options.encoders
    encoder = DVAEEncoder(prepared.model.to(prepared.device), options.precision, compiled=job.compiled)
    shares = [decoders_of_encoder(options.decoders, encoders, number) for number in range(encoders)]
    decoders = sum(max(1, decoders_of(share, found.planned.entries)) for share in shares)
    try:
        measured = measure_stages(
            job,
            found.samples,
            encoder,
            options.out,
            decoders=decoders,
            encoders=encoders,
            access=options.access,
        )
    except DataError as error:
        return [("time", f"unknown: {error}")]
    rows = [
        (stage.name, f"{1000 * stage.seconds:,.2f} ms an image, {_processes(stage)}: {stage.rate:,.0f} images/s")
        for stage in measured.stages
    ]
    limit = measured.limit
    rows.append(("limit", f"{limit.name}: {limit.rate:,.0f} images/s to expect. {_WAYS_OUT[limit.name]}"))
    images = (found.planned.entries - found.made) / prepared.count
    of_all = f" for this worker's share of {prepared.count}" if prepared.count > 1 else ""
    lost = f", {measured.rejected} of which cannot be used" if measured.rejected else ""
    rows.append(
        (
            "time",
            f"about {_in_words(images / limit.rate)}{of_all} to write {size(needed // prepared.count)}; "
            f"{measured.looked_at} images looked at{lost}",
        )
    )
    return rows


def _processes(stage: Stage) -> str:
    if stage.name == "cores":
        return f"all stages together, on {counted(int(stage.processes), 'core')}"
    return counted(int(stage.processes), "process", "processes")


def _in_words(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
