"""Every file below a folder of a store, with its size, page by page: a bucket is never in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_PARALLEL = 16
"""Folders that are listed at once; S3 takes thousands of listings a second."""

Found = Iterator[tuple[str, int]]
"""(path below the folder, bytes), in no particular order."""


def s3_files(system: Any, bucket: str, prefix: str) -> Found:
    """What lies below ``prefix``, which is empty or ends with ``/``.

    A listing gives a thousand keys and says where the next begins, so one folder is listed page after page.
    Folders are told apart only until there are enough of them to list side by side, each with all below it.
    """
    pending = deque([prefix])
    while pending and len(pending) < _PARALLEL:
        for page in _pages(system, bucket, pending.popleft(), delimiter="/"):
            pending += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
            yield from _entries(page, prefix)

    def below(folder: str) -> list[tuple[str, int]]:
        return [entry for page in _pages(system, bucket, folder) for entry in _entries(page, prefix)]

    if pending:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for found in pool.map(below, pending):
                yield from found


def _pages(system: Any, bucket: str, prefix: str, delimiter: str = "") -> Iterator[dict[str, Any]]:
    position: dict[str, str] = {}
    while True:
        page = system.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **position, **system.req_kw
        )
        yield page
        if not page.get("IsTruncated"):
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


def _entries(page: dict[str, Any], prefix: str) -> Found:
    for entry in page.get("Contents", ()):
        if not entry["Key"].endswith("/"):  # consoles create such empty objects as "folders"
            yield entry["Key"][len(prefix) :], int(entry["Size"])


def folder_files(ls: Callable[[str], list[dict[str, Any]]], root: str) -> Found:
    """What lies below ``root`` of any other store, folder by folder.

    Args:
        ls: a folder's entries, as fsspec's ``ls`` with details gives them.
        root: as in the entries' names.
    """
    pending = [root]
    while pending:
        folder = pending.pop()
        for entry in ls(folder):
            name = str(entry["name"]).rstrip("/")
            if entry["type"] == "directory" and name != folder:
                pending.append(name)
            elif entry["type"] == "file" and name != root:
                yield name[len(root) :].lstrip("/"), int(entry["size"] or 0)
