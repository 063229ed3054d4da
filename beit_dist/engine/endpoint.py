"""A Prometheus endpoint, with the health of what it tells of: where it listens, and what if its port is taken."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, start_http_server

from beit_dist.errors import ConfigError

HEALTH = "/healthz"


@dataclass(frozen=True)
class Health:
    """Whether work is being done."""

    state: Literal["starting", "working", "stalled", "failed"]
    """``starting``: nothing is done yet."""
    seconds: float
    """Since the last step, or whatever else shows progress, ended."""
    limit: float | None
    """Seconds without progress from which on the work is stalled."""

    @classmethod
    def by_time(cls, seconds: float, limit: float | None, begun: bool) -> Health:
        """The health of what has been silent for ``seconds``."""
        if limit is not None and seconds > limit:
            return cls("stalled", seconds, limit)
        return cls("working" if begun else "starting", seconds, limit)

    @property
    def status(self) -> str:
        """Of HTTP."""
        return "503 Service Unavailable" if self.state in ("stalled", "failed") else "200 OK"

    def as_json(self) -> bytes:
        """What is answered."""
        facts = {"state": self.state, "silent_seconds": round(self.seconds, 1), "limit_seconds": self.limit}
        return (json.dumps(facts) + "\n").encode()


class Endpoint:
    """Serves a registry until it is closed, and the health at ``/healthz``.

    A port in use, or below 1024 and not ours to take, must not stop what is measured: a free one is taken, and
    named in a line.

    Args:
        registry: what is served.
        address: of this host; ``0.0.0.0`` is all of them.
        port: 0 takes any that is free.
        field: the setting of the address.
        health: asked at each request, from a thread of its own; None serves no ``/healthz``.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: the address is not this host's.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        address: str,
        port: int,
        field: str,
        health: Callable[[], Health] | None = None,
    ) -> None:
        try:
            self._server: Any = start_http_server(port, address, registry=registry)[0]
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise _not_ours(field, address, error) from None
            self._server = start_http_server(0, address, registry=registry)[0]
            reason = "is in use" if error.errno == errno.EADDRINUSE else "is reserved for the system"
            print(f"metrics: port {port} {reason}, so they are served at port {self.port}", flush=True)
        self._server.set_app(_with_health(self._server.get_app(), health))

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def _with_health(metrics: Any, health: Callable[[], Health] | None) -> Callable[..., Iterable[bytes]]:
    """A WSGI application: the metrics' own, and the health."""

    def answer(environment: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environment.get("PATH_INFO") != HEALTH:
            found: Iterable[bytes] = metrics(environment, start)
            return found
        if health is None:
            start("404 Not Found", [])
            return [b""]
        now = health()
        start(now.status, [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
        return [now.as_json()]

    return answer


def check_address(field: str, address: str) -> None:
    """Refuse an address at which nothing can listen on this host.

    Raises:
        ConfigError: of ``field``.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        raise _not_ours(field, address, error) from None


def _not_ours(field: str, address: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    way_out = "Use 127.0.0.1 for this host alone, 0.0.0.0 for the whole network."
    return ConfigError(field, address, f"an address of this host, {socket.gethostname()} ({reason})", way_out)
