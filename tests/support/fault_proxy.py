"""A proxy before an HTTP or S3 server that answers some requests wrongly, late, or not at all.

    with FaultProxy(store.endpoint_url, whole=store.whole) as proxy:
        proxy.inject(Fault("slow_down", method="GET", path="/v00/", times=2))
        ...  # a client of proxy.url
        assert proxy.injected == {"slow_down": 2}

Heads pass through as they are, ``Host`` included, so that signatures stay valid.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from support.http_thread import HttpThread

Kind = Literal["slow_down", "server_error", "reset", "lost", "cut", "stall", "delay", "whole", "denied"]

_ERRORS = {
    "slow_down": (503, "Slow Down", "SlowDown"),
    "server_error": (500, "Internal Error", "InternalError"),
    "denied": (403, "Forbidden", "AccessDenied"),
}
_CHUNK = 1 << 16


@dataclass
class Fault:
    """What goes wrong, and for which requests.

    Attributes:
        kind: what happens instead of the server's answer:

            - ``slow_down``, ``server_error``, ``denied``: a 503, 500 or 403 in the form that S3 gives it; the
              server sees nothing;
            - ``reset``: the connection is reset before the server sees the request;
            - ``lost``: the same after the server has done what was asked;
            - ``cut``: the body ends after ``after`` bytes, by FIN or with ``rst`` by RST;
            - ``stall``: the body pauses after ``after`` bytes for ``seconds``;
            - ``delay``: the request waits for ``seconds`` before it goes on to the server;
            - ``whole``: a range is answered with 200 and the whole file.
        method: of the requests, or "" for all.
        path: a part of the path with the query, before any decoding.
        times: at most so often; None for no limit.
        chance: probability for each request that fits.
    """

    kind: Kind
    method: str = ""
    path: str = ""
    times: int | None = None
    chance: float = 1.0
    after: int = 0
    seconds: float = 0.0
    rst: bool = False


class Seen(NamedTuple):
    """A request that reached the proxy, and the kind of fault it met, or ""."""

    method: str
    path: str
    fault: str


class FaultProxy(HttpThread):
    """Stands before ``upstream``; any thread may change the faults at any time.

    Args:
        upstream: URL of the server, without a path.
        whole: path to content of a file, for ``whole``. By default a plain GET, which a store refuses.
        seed: of the draws for ``chance``.

    Attributes:
        url: what clients are given in place of ``upstream``.
        seen: all requests so far, in the order of their arrival.
    """

    def __init__(self, upstream: str, whole: Callable[[str], bytes] | None = None, seed: int = 0) -> None:
        super().__init__(_Handler)
        self.upstream = urlsplit(upstream).netloc
        self.whole = whole or self._plain
        self.seen: list[Seen] = []
        self._faults: list[Fault] = []
        self._draws, self._lock = random.Random(seed), threading.Lock()

    def inject(self, *faults: Fault) -> None:
        """Have these faults from now on, and no others; the first that fits a request is taken."""
        with self._lock:
            self._faults = list(faults)

    @property
    def injected(self) -> Counter[str]:
        """How often each kind was injected so far."""
        return Counter(seen.fault for seen in list(self.seen) if seen.fault)

    def choose(self, method: str, path: str, has_range: bool) -> Fault | None:
        """The fault for a request, which is noted down."""
        with self._lock:
            chosen = next(filter(lambda fault: self._hits(fault, method, path, has_range), self._faults), None)
            if chosen is not None and chosen.times is not None:
                chosen.times -= 1
            self.seen.append(Seen(method, path, chosen.kind if chosen else ""))
            return chosen

    def _hits(self, fault: Fault, method: str, path: str, has_range: bool) -> bool:
        return (
            fault.method in ("", method)
            and fault.path in path
            and fault.times != 0
            and (has_range or fault.kind != "whole")
            and (fault.chance >= 1 or self._draws.random() < fault.chance)
        )

    def _plain(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.upstream}{path}", timeout=30) as answer:
            content: bytes = answer.read()
        return content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _any(self) -> None:
        proxy: FaultProxy = self.server.owner  # type: ignore[attr-defined]
        if "Transfer-Encoding" in self.headers:
            self._answer(501, "Not Implemented", b"the proxy forwards bodies of a known length only")
            self.close_connection = True
            return
        fault = proxy.choose(self.command, self.path, "Range" in self.headers)
        kind = fault.kind if fault else None
        if kind == "reset":
            self._reset()
            return
        if fault and kind == "delay":
            proxy.stopping.wait(fault.seconds)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the client has gone
            self.close_connection = True
            return
        if kind in _ERRORS:
            status, reason, code = _ERRORS[kind]
            self._answer(status, reason, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
        elif kind == "whole":
            self._answer(200, "OK", proxy.whole(self.path))
        else:
            self._forward(proxy, body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815

    def _forward(self, proxy: FaultProxy, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):  # this proxy has said "continue" itself
                    upstream.putheader(name, value)
            upstream.putheader("Connection", "close")
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            if fault and fault.kind == "lost":
                answer.read()
                self._reset()
                return
            self._head(answer.status, answer.reason, answer.getheaders())
            length = answer.getheader("Content-Length")
            self.close_connection = self.close_connection or (length is None and self.command != "HEAD")
            self._body(proxy, iter(lambda: answer.read1(_CHUNK), b""), fault)
        finally:
            upstream.close()

    def _body(self, proxy: FaultProxy, chunks: Iterable[bytes], fault: Fault | None) -> None:
        sent, pending = 0, fault if fault and fault.kind in ("cut", "stall") else None
        for chunk in chunks:
            if pending and sent + len(chunk) > pending.after:
                before = pending.after - sent
                self.wfile.write(chunk[:before])
                if pending.kind == "cut":
                    self._reset() if pending.rst else self._finish()
                    return
                proxy.stopping.wait(pending.seconds)
                chunk, sent, pending = chunk[before:], sent + before, None
            self.wfile.write(chunk)
            sent += len(chunk)

    def _answer(self, status: int, reason: str, body: bytes) -> None:
        self._head(status, reason, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, reason: str, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "keep-alive"):
                self.send_header(name, value)
        self.end_headers()

    def _finish(self) -> None:
        """End the answer here: the client sees an orderly end that comes too early."""
        self.close_connection = True

    def _reset(self) -> None:
        """Close at once with RST; an ordinary close would send FIN first."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet: the test says what matters."""
