"""Freezing: every image of folders and tars, in one order that the recorded seed decides."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from beit_dist.data.draws import Purpose, permutation
from beit_dist.data.gathering import ImageEntry
from beit_dist.data.left_out import LeftOut, no_images
from beit_dist.data.listing import expand_sources, list_images
from beit_dist.data.sample import SampleNotes, encode_notes, sample_key
from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place, is_url
from beit_dist.tokenizing.sources import SOURCES_NAME, SourcesHeader, label_of, read_header


def freeze(
    images: Sequence[str], out: Place, seed: int, access: Access | None = None, *, sniff: bool = False
) -> SourcesHeader:
    """Write ``sources.jsonl``, or keep the one that is there if it was frozen from the same sources and seed.

    Prints what is left out of the list, by kind.

    Args:
        images: folders and tars, as a user names them.
        out: the data set's folder.
        seed: of the order.
        access: how URLs are reached.
        sniff: read the first bytes of files at URLs whose names do not tell what they are.

    Raises:
        ConfigError: the sources, seed or ``out`` cannot be used, or the list there is of others.
        DataError: a tar is compressed or damaged, a class name too long, or there is no image at all.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError("--seed", seed, "0 to 2**63 - 1")
    sources = expand_sources(images, access)
    # Elsewhere it is done in any case.
    sniff = sniff and any(kind == "folder" and is_url(path) for kind, path in sources)
    if out.exists(SOURCES_NAME):
        header = read_header(out)
        check_same_sources(header, sources, seed, out, sniff)
        return header
    out.make()  # where that fails it should fail now, and not when millions of images are listed
    left_out = LeftOut()
    with tqdm(desc="listing images", unit=" images", disable=None) as bar:
        entries = list_images(sources, access, sniff=sniff, left_out=left_out, progress=bar.update)
    if not entries:
        raise no_images(f"--images {' '.join(images)}", left_out)
    for line in left_out.lines():
        print(line, flush=True)
    labels = _label_names(entries)
    header = SourcesHeader(sources, seed, len(entries), bool(labels), sniff)
    for label in labels:
        # The longest json: refuse the label now rather than in the middle of the job.
        encode_notes(0, sample_key(0, 0), SampleNotes("", label, (9**9,) * 4, flip=False))
    with out.writing(SOURCES_NAME) as file:
        file.write((header.to_line() + "\n").encode())
        for row in permutation(seed, Purpose.SOURCE_ORDER, (), len(entries)):
            file.write(_line(entries[row], sources))
    return header


def check_same_sources(
    header: SourcesHeader,
    sources: tuple[tuple[str, str], ...] | None,
    seed: int,
    out: Place,
    sniff: bool = False,
) -> None:
    """Refuse a list that was frozen from other images (None: not asked) or with another seed."""
    way_out = f"Give the same as when {out / SOURCES_NAME} was frozen, or start over in another --out."
    if sources is not None and sources != header.sources:
        got, expected = ([path for _, path in s] for s in (sources, header.sources))
        raise ConfigError("--images", got, f"{expected}", way_out)
    if seed != header.seed:
        raise ConfigError("--seed", seed, f"{header.seed}", way_out)
    if sniff and not header.sniff:
        raise ConfigError("--sniff", sniff, "none, as for the list that is there", way_out)


def _label_names(entries: Iterable[ImageEntry]) -> set[str]:
    """The class folders, if there are any: every image lies in some folder, and they are at least two."""
    labels = {label_of(os.fsdecode(entry.name)) for entry in entries}
    return labels if "" not in labels and len(labels) > 1 else set()


def _line(entry: ImageEntry, sources: tuple[tuple[str, str], ...]) -> bytes:
    fields: dict[str, str | int] = {"name": os.fsdecode(entry.name), "source": entry.source, "bytes": entry.size}
    if sources[entry.source][0] == "tar":
        fields["offset"] = entry.offset
    return (json.dumps(fields) + "\n").encode()
