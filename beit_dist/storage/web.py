"""Files on web servers. Answers are looked at before their bytes are read.

A server may ignore that a part is asked for and send the whole file, which can be gigabytes, each time.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from fsspec.asyn import sync

from beit_dist.errors import ConfigError, RangesError
from beit_dist.storage.place import shown
from beit_dist.storage.remote import RemotePlace
from beit_dist.storage.retries import ShortReadError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)


class WebPlace(RemotePlace):
    """A folder of a web server, which cannot be written to."""

    takes_files = False
    can_list = False  # fsspec takes the links of a page for a list, which has no sizes

    def make(self) -> None:
        """Refuse: nothing can be written here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "url", str(self), "a folder or an object store", "Nothing can be written to a web server."
        )

    def options(self) -> dict[str, Any]:
        import aiohttp  # takes a quarter of a second

        options, access = super().options(), self.access
        # aiohttp's own limit is five minutes for a whole answer, however fast it comes in.
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=access.connect_seconds, sock_read=access.read_seconds
        )
        return {**options, "client_kwargs": {"timeout": limits, **options.get("client_kwargs", {})}}

    def read_once(self, system: Any, url: str, offset: int, size: int) -> bytes:
        """See :meth:`RemotePlace.read_once`.

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
        f"{shown(url)}: asked for {asked}, the server answered with {got}. Tars and shards are read in parts, and "
        "this server sends none. Use one that supports ranges (nginx, Apache, Caddy; Python's http.server does "
        "not), or copy the files to a folder or a bucket"
    )
