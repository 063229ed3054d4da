"""Finding images: from sources as users name them to a list of what they hold."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from beit_dist.errors import ConfigError
from beit_dist.images.file_kinds import by_name, file_kind, folder_kind
from beit_dist.images.gathering import Entry, Gathered
from beit_dist.images.left_out import LeftOut
from beit_dist.images.recognition import recognise
from beit_dist.images.source import Source
from beit_dist.images.sources.folder import Folder
from beit_dist.images.sources.table import FILES
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import is_url

_AT_ONCE = 32
"""Sources that are searched side by side: a tar's header is read only when the one before it is known."""
_BRACES = "Name them one by one or with braces: a-{000..099}.tar"
_OTHER_ARCHIVES = (".tgz", ".tbz2", ".txz", ".7z", ".rar", ".arrow")


def expand_sources(images: Sequence[str], access: Access | None = None) -> tuple[Source, ...]:
    """The sources that a user named, in that order.

    A folder with tars (or zips, or parquet files) and neither folders nor images in it stands for them; others
    are taken as they are. Anything else is a webdataset specification: ``a-{000..009}.tar``, several joined by
    ``::``; with ``*``, ``?`` or ``[`` it stands for everything it matches, sorted by name. The end of a URL tells
    what it is; any other URL is a folder. No request is sent.

    Raises:
        ConfigError: something local is not a source, a pattern matches nothing, or a URL holds credentials.
        DataError: a local tar is compressed.
    """
    access = access or Access()
    found: list[Source] = []
    for spec in (spec.removeprefix("file://") for spec in images):
        for path in [spec] if not is_url(spec) and os.path.isdir(spec) else _expand(spec):
            found += [_at_url(path)] if is_url(path) else _here(path, access)
    doubles = sorted(path for path, times in Counter(source.path for source in found).items() if times > 1)
    if doubles:
        raise ConfigError(
            "--images", doubles[0], "each source once", "It is named twice, or a pattern matches it as well."
        )
    return tuple(found)


def list_images(
    sources: Sequence[Source],
    access: Access | None = None,
    *,
    sniff: bool = False,
    left_out: LeftOut | None = None,
    progress: Callable[[int], object] = lambda _: None,
    labels: bool = False,
) -> list[Entry]:
    """Every image of ``sources``, sorted.

    Args:
        sniff: also read the first bytes of files at URLs whose names do not tell what they are.
        left_out: collects what is said of all other files.
        progress: called with the number of images just found.
        labels: also read the labels that tars have in files beside their images (``.cls``, ``.json``).

    Raises:
        DataError: a source cannot be listed, or is damaged.
        ConfigError: what a URL names is something else.
    """
    access, left_out = access or Access(), LeftOut() if left_out is None else left_out

    def search(number: int, source: Source) -> Gathered:
        gathered = Gathered(number, sniff, progress, labels)
        _check_url(source, access)
        source.search(gathered, access)
        return gathered

    found: list[Entry] = []
    for gathered in _side_by_side(search, sources):
        found += gathered.finish(left_out)
    return sorted(found)


def _side_by_side(search: Callable[[int, Source], Gathered], sources: Sequence[Source]) -> Iterator[Gathered]:
    if len(sources) == 1:  # in this thread, where Ctrl-C ends it at once
        yield search(0, sources[0])
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(search, range(len(sources)), sources)


def _expand(spec: str) -> list[str]:
    if spec.startswith("pipe:"):
        raise ConfigError("--images", spec, "folders and archives, here or at a URL", "pipe: is not supported.")
    try:
        import webdataset as wds  # it loads PyTorch, which who only decodes does without

        return [str(path) for path in wds.shardlists.expand_urls(spec)]
    except AssertionError as error:  # webdataset's way of telling that ${NAME} is not set
        raise ConfigError("--images", spec, f"variables that are set in the environment ({error})") from None
    except ValueError:
        raise ConfigError("--images", spec, "braces in pairs, as in a-{000..099}.tar") from None


def _here(path: str, access: Access) -> list[Source]:
    """What a local path or pattern stands for."""
    if glob.has_magic(path) and not os.path.lexists(path):
        matches = sorted(glob.glob(path), key=os.fsencode)
        if not matches:
            raise ConfigError("--images", path, "a pattern that matches something", "Try it with ls.")
        return [source for match in matches for source in _here(match, access)]
    if not os.path.isdir(path):
        return [replace(recognise(path, access), path=os.path.abspath(path))]
    archives = _archives_in(path)
    return [source for file in archives for source in _here(file, access)] or [Folder(os.path.abspath(path))]


def _archives_in(folder: str) -> list[str]:
    """The archives of a folder with neither folders nor images beside them, by name; none for any other folder.

    All are of one kind: the first in the table of which there is one.
    """
    try:
        entries = [
            entry for entry in os.scandir(folder) if not file_kind(entry.name) and not folder_kind(entry.name)
        ]
        if any(entry.is_dir() or by_name(entry.name) == "image" for entry in entries):
            return []
    except OSError:
        return []  # what lists the folder says why
    kinds = ([entry.path for entry in entries if entry.name.lower().endswith(kind.suffixes)] for kind in FILES)
    return sorted(next(filter(None, kinds), []), key=os.fsencode)


def _at_url(url: str) -> Source:
    place = open_place(url, field="--images")
    if "*" in url:
        raise ConfigError("--images", url, "a URL without a pattern; patterns work on this machine only", _BRACES)
    name = url.rstrip("/").rpartition("/")[2].lower()
    for kind in FILES:
        if name.endswith(kind.suffixes):
            return kind(url)
    if ".tar." in name or name.endswith(_OTHER_ARCHIVES):
        raise ConfigError(
            "--images", url, "a plain .tar, whose images can be read by position", "Unpack it first."
        )
    if not place.can_list:
        raise ConfigError("--images", url, "tars, because a web server lists no folders", _BRACES)
    return Folder(url.rstrip("/"))


def _check_url(source: Source, access: Access) -> None:
    """A local file was looked at when it was named; at a URL only the name was known until now."""
    if source.suffixes and is_url(source.path):
        found = recognise(source.path, access)
        if found != source:
            expected = f"a {source.kind}, as its name says (the file is a {found.kind})"
            raise ConfigError("--images", source.path, expected, "Rename it.")
