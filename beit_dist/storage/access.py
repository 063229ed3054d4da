"""How URLs are reached: time limits, connections, and options for fsspec. It never holds a secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Access:
    """Settings of all requests. Credentials are not among them: the clients take them from the environment.

    Attributes:
        retry_seconds: how long a request is retried, counted from its first failure.
        connect_seconds: limit for making a connection.
        read_seconds: limit for the next bytes of an answer.
        connections: most connections of one process to one store.
        options: for fsspec, by protocol: ``{"s3": {"endpoint_url": "https://..."}}``.
    """

    retry_seconds: float = 120.0
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    connections: int = 32
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
