"""How storage at URLs is reached: time limits, connections, and options for fsspec. No secret is ever in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Access:
    """Settings of all requests. Credentials are not among them: the clients take them from the environment.

    Attributes:
        retry_seconds: how long a request is tried again, from its first failure on.
        connect_seconds: limit for a connection to be made.
        read_seconds: limit for the next bytes of an answer.
        connections: at most so many to one store from one process.
        s3_reader: what reads ranges of objects in S3: ``s3fs`` or ``obstore``.
        options: for fsspec, by protocol: ``{"s3": {"endpoint_url": "https://..."}}``.
    """

    retry_seconds: float = 120.0
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    connections: int = 32
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    s3_reader: str = "s3fs"
