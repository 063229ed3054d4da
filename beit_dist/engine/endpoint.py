"""A Prometheus endpoint: where it listens, and what becomes of a port that is taken."""

from __future__ import annotations

import errno
import socket
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from beit_dist.errors import ConfigError


class Endpoint:
    """Serves a registry until it is closed.

    A port in use, or below 1024 and not ours to take, must not stop what is measured: a free one is taken, and
    named in a line.

    Args:
        registry: what is served.
        address: of this host; ``0.0.0.0`` is all of them.
        port: 0 takes any that is free.
        field: the setting of the address.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: the address is not this host's.
    """

    def __init__(self, registry: CollectorRegistry, address: str, port: int, field: str) -> None:
        try:
            self._server: Any = start_http_server(port, address, registry=registry)[0]
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise _not_ours(field, address, error) from None
            self._server = start_http_server(0, address, registry=registry)[0]
            reason = "is in use" if error.errno == errno.EADDRINUSE else "is reserved for the system"
            print(f"metrics: port {port} {reason}, so they are served at port {self.port}", flush=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


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
