"""Ranges of files on web servers, whose answers are looked at before their bytes are read.

A server may ignore that a part is asked for and send the whole file, which can be gigabytes, each time.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from fsspec.asyn import sync

from beit_dist.errors import RangesError
from beit_dist.storage.place import shown
from beit_dist.storage.retries import ShortReadError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)


def read_http_range(system: Any, url: str, offset: int, size: int) -> bytes:
    """``size`` bytes of the file at ``url`` from ``offset`` on, or as many of them as it has.

    Args:
        system: fsspec's file system of the protocol.

    Raises:
        RangesError: the server sends something else than the range.
        FileNotFoundError: there is no such file.
        ShortReadError: the answer ended early; another try may do better.
    """
    content: bytes = sync(system.loop, _read, system, url, offset, size)
    return content


async def _read(system: Any, url: str, offset: int, size: int) -> bytes:
    asked = f"bytes={offset}-{offset + size - 1}"
    options = dict(system.kwargs)
    options["headers"] = {**options.get("headers", {}), "Range": asked, "Accept-Encoding": "identity"}
    session = await system.set_session()
    async with session.get(system.encode_url(url), **options) as answer:
        length = answer.content_length
        if answer.status == 416:
            said = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
            if said and int(said[1]) <= offset:
                return b""  # the file ends before
            _refuse(url, asked, "status 416, as if the file had no such bytes")
        system._raise_not_found_for_status(answer, url)
        if answer.status != 206:
            if offset or length != size:  # else the whole file is what was asked for
                _refuse(url, asked, f"status {answer.status} and {length or 'an unknown number of'} bytes")
            return await _body(answer, size)
        text = answer.headers.get("Content-Range", "")
        said = _CONTENT_RANGE.fullmatch(text.strip())
        if said is None:
            if text or length != size:
                _refuse(url, asked, f"Content-Range {text!r}")
            return await _body(answer, size)
        first, last = int(said[1]), int(said[2])
        held = last + 1 - first
        if first != offset or held > size or length not in (None, held):
            _refuse(url, asked, f"Content-Range {text!r} and {length} bytes")
        return await _body(answer, held)


async def _body(answer: Any, size: int) -> bytes:
    """The answer's bytes; one that is longer than it says is not read to its end."""
    content = bytearray()
    async for piece in answer.content.iter_any():
        content += piece
        if len(content) > size:
            break
    if len(content) != size:
        raise ShortReadError(f"got {len(content)} bytes, expected {size}")
    return bytes(content)


def _refuse(url: str, asked: str, got: str) -> NoReturn:
    raise RangesError(
        f"{shown(url)}: asked for {asked}, the server answers {got}. It cannot send parts of files, which is what "
        "tars and shards are read in. Use a web server that answers ranges (nginx, Apache, Caddy; Python's "
        "http.server does not), or copy the files to a folder or a bucket"
    )
