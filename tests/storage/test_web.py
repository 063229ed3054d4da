"""A web server that does not send the parts it is asked for is found out by its first answer."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from support.http_thread import HttpThread

from beit_dist.errors import RangesError
from beit_dist.images.recognition import recognise
from beit_dist.shards.manifest import check_shard_files, load_manifest
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place

CONTENT = bytes(range(256)) * 40
HUGE = 1 << 40
"""Bytes that the server says it sends: who reads them all does not come back."""

Answers = dict[str, tuple[int, dict[str, str], bytes]]


class Server(HttpThread):
    """Answers what asks for a range by what ``answer`` makes of its first and last byte."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.files = {"file": CONTENT}
        self.answer: Callable[[bytes, int, int], tuple[int, dict[str, object], bytes]] = whole
        self.asked = 0


def whole(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    return 200, {"Content-Length": len(content)}, content


def endless(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    return 200, {"Content-Length": HUGE}, b""


def refusing(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    return 416, {"Content-Length": 0, "Content-Range": f"bytes */{len(content)}"}, b""


def shifted(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    said = f"bytes {first + 1}-{last + 1}/{len(content)}"
    return 206, {"Content-Length": last + 1 - first, "Content-Range": said}, content[first : last + 1]


def longer(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    return 206, {"Content-Length": len(content), "Content-Range": f"bytes {first}-{last}/{len(content)}"}, content


def lying(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    return 206, {"Content-Length": len(content)}, content


def right(content: bytes, first: int, last: int) -> tuple[int, dict[str, object], bytes]:
    part = content[first : last + 1]
    if not part:
        return refusing(content, first, last)
    said = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
    return 206, {"Content-Length": len(part), "Content-Range": said}, part


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Server = self.server.owner  # type: ignore[attr-defined]
        content = server.files.get(self.path.lstrip("/"))
        if content is None:
            self._send(404, {"Content-Length": 0}, b"")
        elif "Range" not in self.headers:
            self._send(200, {"Content-Length": len(content)}, content)
        else:
            server.asked += 1
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self._send(*server.answer(content, int(first), int(last)))

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: int, headers: dict[str, object], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.mark.parametrize("answer", [whole, endless, refusing, shifted, longer, lying])
def test_the_first_wrong_answer_is_said_and_not_asked_for_again(
    server: Server, answer: Callable[..., object]
) -> None:
    server.answer = answer
    place = open_place(server.url, Access(retry_seconds=5.0))
    began = time.monotonic()
    with pytest.raises(
        RangesError, match=r"/file: asked for bytes=100-149, the server answered with .*copy the files"
    ):
        place.read_range("file", 100, 50)
    assert (server.asked, RangesError.exit_code) == (1, 2)
    assert time.monotonic() - began < 30


def test_right_answers_are_taken_and_the_end_of_the_file_is_told(server: Server) -> None:
    server.answer = right
    place = open_place(server.url)
    assert place.read_range("file", 100, 50) == CONTENT[100:150]
    for offset in (len(CONTENT) - 10, len(CONTENT) + 10):
        with pytest.raises(EOFError, match=f"the file has {len(CONTENT)}"):
            place.read_range("file", offset, 20)
    with pytest.raises(FileNotFoundError):
        place.read_range("none", 0, 1)
    server.answer = whole
    assert place.read_range("file", 0, len(CONTENT)) == CONTENT  # the range is the file


def test_tars_and_shards_there_are_refused_before_any_work(server: Server, tmp_path, make_shards) -> None:  # type: ignore[no-untyped-def]
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 200_000
        tar.addfile(member, io.BytesIO(bytes(200_000)))
    server.files["images.tar"] = raw.getvalue()
    with pytest.raises(RangesError, match=r"images\.tar: asked for"):
        recognise(f"{server.url}/images.tar", Access())
    make_shards(tmp_path)
    server.files |= {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    manifest = load_manifest(server.url)
    with pytest.raises(RangesError, match=r"v00/shard-.*: asked for"):
        check_shard_files(server.url, manifest)
    server.answer = right
    check_shard_files(server.url, manifest)
