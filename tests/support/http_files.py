"""A plain HTTP server of one folder that answers ranges, which Python's own does not."""

from __future__ import annotations

import os
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from support.http_thread import HttpThread


class HttpFiles(HttpThread):
    """Serves the files of ``root`` and of folders in it, read only, without listings."""

    def __init__(self, root: Path) -> None:
        super().__init__(_Handler)
        self.root = root.resolve()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        root: Path = self.server.owner.root  # type: ignore[attr-defined]
        path = (root / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        if not (path.is_relative_to(root) and path.is_file()):
            self._head(404, 0)
            return
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if wanted is None or wanted.groups() == ("", ""):
                first, end, status = 0, size, 200
            elif not wanted[1]:
                first, end, status = max(0, size - int(wanted[2])), size, 206
            else:
                first, end, status = int(wanted[1]), min(size, int(wanted[2] or size) + 1), 206
            if status == 206 and first >= end:
                self._head(416, 0, f"bytes */{size}")
                return
            self._head(status, end - first, f"bytes {first}-{end - 1}/{size}" if status == 206 else None)
            if self.command == "GET":
                file.seek(first)
                while first < end and (chunk := file.read(min(1 << 20, end - first))):
                    self.wfile.write(chunk)
                    first += len(chunk)

    do_HEAD = do_GET  # noqa: N815

    def _head(self, status: int, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet: the test says what matters."""
