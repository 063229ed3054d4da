"""Freezing: every image of all sources, in one order that the recorded seed decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from beit_dist.draws import Purpose, permutation
from beit_dist.errors import ConfigError
from beit_dist.images.gathering import Entry
from beit_dist.images.left_out import LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.source import Source
from beit_dist.shards.sample import SampleNotes, encode_notes, sample_key
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.tokenizing.parts import check_held_out, held_out_images
from beit_dist.tokenizing.sources import SOURCES_NAME, SourcesHeader, read_header


def freeze(
    images: Sequence[str],
    out: Place,
    seed: int,
    access: Access | None = None,
    *,
    sniff: bool = False,
    held_out: str | None = None,
) -> SourcesHeader:
    """Write ``sources.jsonl``, or keep the one that is there if it was frozen from the same sources and seed.

    Prints what is left out of the list, by kind.

    Args:
        images: the sources, as a user names them.
        out: the data set's folder.
        seed: of the order.
        access: how URLs are reached.
        sniff: read the first bytes of files at URLs whose names do not tell what they are.
        held_out: see :func:`beit_dist.tokenizing.parts.held_out_images`; None: as in the list that is there.

    Raises:
        ConfigError: the sources, seed, split or ``out`` cannot be used, or the list there is of others.
        DataError: a source is compressed or damaged, a class name too long, or there is no image at all.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError("--seed", seed, "0 to 2**63 - 1")
    check_held_out(held_out)
    sources = expand_sources(images, access)
    # Elsewhere it is done in any case.
    sniff = sniff and any(source.sniffs_on_request for source in sources)
    if out.exists(SOURCES_NAME):
        header = read_header(out)
        check_same_sources(header, sources, seed, out, sniff, held_out)
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
    kept_aside = held_out_images(held_out, len(entries))
    header = SourcesHeader(sources, seed, len(entries), bool(labels), sniff, kept_aside)
    for label in labels:
        # The longest json: refuse the label now rather than in the middle of the job.
        encode_notes(0, sample_key(0, 0), SampleNotes("", label, (9**9,) * 4, flip=False))
    with out.writing(SOURCES_NAME) as file:
        file.write((header.to_line() + "\n").encode())
        for row in permutation(seed, Purpose.SOURCE_ORDER, (), len(entries)):
            file.write(header.entry_line(entries[row]))
    return header


def check_same_sources(
    header: SourcesHeader,
    sources: tuple[Source, ...] | None,
    seed: int,
    out: Place,
    sniff: bool = False,
    held_out: str | None = None,
) -> None:
    """Refuse a list that was frozen from other images, with another seed or another split (None: not asked)."""
    way_out = f"Give the same as when {out / SOURCES_NAME} was frozen, or start over in another --out."
    if sources is not None and sources != header.sources:
        got, expected = ([source.path for source in several] for several in (sources, header.sources))
        raise ConfigError("--images", got, f"{expected}", way_out)
    if seed != header.seed:
        raise ConfigError("--seed", seed, f"{header.seed}", way_out)
    if sniff and not header.sniff:
        raise ConfigError("--sniff", sniff, "none, as when the list was frozen", way_out)
    if held_out is not None and held_out_images(held_out, header.entries) != header.held_out:
        raise ConfigError("--held-out", held_out, f"{header.held_out} of {header.entries} images", way_out)


def _label_names(entries: Iterable[Entry]) -> set[str]:
    """The labels, if there are any: every image has one, and they are at least two."""
    labels = {entry.class_name for entry in entries}
    return labels if "" not in labels and len(labels) > 1 else set()
