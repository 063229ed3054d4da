"""Finding images: the files below folders and the members of tars, here or at URLs, as users name them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import webdataset as wds

from beit_dist.data.file_kinds import by_name, file_kind, folder_kind
from beit_dist.data.gathering import Gathered, ImageEntry
from beit_dist.data.image_folders import search_folder, search_store
from beit_dist.data.image_tars import check_tar, scan_tar
from beit_dist.data.left_out import LeftOut
from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import check_place, is_url

_TARS_AT_ONCE = 32
"""Tars that are scanned side by side: a header is read only when the one before it is known."""
_ARCHIVES = (".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".parquet", ".arrow")


def expand_sources(images: Sequence[str], access: Access | None = None) -> tuple[tuple[str, str], ...]:
    """("folder" or "tar", absolute path or URL) of each source a user named, in that order.

    A folder with tars and neither folders nor images in it stands for its tars; others are taken as they are.
    Anything else is a webdataset shard specification: ``a-{000..009}.tar``, several joined by ``::``. A URL is a
    tar if it ends like one, else a folder; nothing is asked of the store.

    Raises:
        ConfigError: something local is neither a folder nor a tar, or a URL holds credentials.
        DataError: a local tar is compressed.
    """
    found: list[tuple[str, str]] = []
    for spec in (spec.removeprefix("file://") for spec in images):
        for path in [spec] if not is_url(spec) and os.path.isdir(spec) else _expand(spec):
            if is_url(path):
                found.append(_at_url(path))
                continue
            tars = _tars_of(path) if os.path.isdir(path) else [path]
            for tar in tars:
                check_tar(tar, access or Access())
                found.append(("tar", os.path.abspath(tar)))
            if not tars:
                found.append(("folder", os.path.abspath(path)))
    doubles = sorted(path for path, times in Counter(path for _, path in found).items() if times > 1)
    if doubles:
        raise ConfigError("--images", doubles[0], "each folder and tar once")
    return tuple(found)


def list_images(
    sources: Sequence[tuple[str, str]],
    access: Access | None = None,
    *,
    sniff: bool = False,
    left_out: LeftOut | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> list[ImageEntry]:
    """Every image of ``sources`` (see :func:`expand_sources`), sorted.

    Args:
        sniff: in folders at URLs, too, read the first bytes of files whose names do not tell what they are.
        left_out: is told of all other files.
        progress: called with how many images were found.

    Raises:
        DataError: a folder cannot be listed, or a tar is damaged.
        ConfigError: what a URL names is no tar, or no folder that can be listed.
    """
    access, left_out = access or Access(), LeftOut() if left_out is None else left_out
    found: list[ImageEntry] = []
    for index, (kind, path) in enumerate(sources):
        if kind == "folder":
            gathered = Gathered(index, ask_later=sniff and is_url(path))
            if is_url(path):
                search_store(open_place(path, access), gathered, progress, sniff=sniff)
            else:
                search_folder(path, gathered, progress)
            found += gathered.finish(left_out)
    tars = [(index, path) for index, (kind, path) in enumerate(sources) if kind == "tar"]
    with ThreadPoolExecutor(_TARS_AT_ONCE) as pool:
        for gathered in pool.map(lambda tar: _tar(tar[0], tar[1], access), tars):
            found += gathered.finish(left_out)
            progress(len(gathered.images))
    return sorted(found)


def _tars_of(folder: str) -> list[str]:
    """The tars of a folder that holds neither folders nor images beside them, by name; none of another folder."""
    try:
        entries = [
            entry for entry in os.scandir(folder) if not file_kind(entry.name) and not folder_kind(entry.name)
        ]
        if any(entry.is_dir() or by_name(entry.name) == "image" for entry in entries):
            return []
    except OSError:
        return []  # what lists the folder says why
    return sorted((entry.path for entry in entries if entry.name.lower().endswith(".tar")), key=os.fsencode)


def _expand(spec: str) -> list[str]:
    if spec.startswith("pipe:"):
        raise ConfigError("--images", spec, "folders and tars, here or at a URL", "Commands are not run.")
    try:
        return [str(path) for path in wds.shardlists.expand_urls(spec)]
    except AssertionError as error:  # webdataset's way of telling that ${NAME} is not set
        raise ConfigError("--images", spec, f"an environment in which it can be expanded ({error})") from None
    except ValueError:
        raise ConfigError("--images", spec, "braces in pairs, as in a-{000..099}.tar") from None


def _at_url(url: str) -> tuple[str, str]:
    check_place("--images", url)
    name = url.rstrip("/").rpartition("/")[2].lower()
    if name.endswith(".tar"):
        return "tar", url
    if ".tar." in name or name.endswith(_ARCHIVES):
        raise ConfigError(
            "--images", url, "a plain .tar, whose images can be read by position", "Unpack it first."
        )
    if urlsplit(url).scheme in ("http", "https"):
        raise ConfigError("--images", url, "tars, as a web server lists no folders", "Name them: a-{000..099}.tar")
    return "folder", url.rstrip("/")


def _tar(source: int, path: str, access: Access) -> Gathered:
    if is_url(path):
        check_tar(path, access)  # local ones have been looked at when they were named
    gathered = Gathered(source)
    scan_tar(path, access, gathered)
    return gathered
