"""How URLs are reached."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, ValidationInfo, model_validator

from beit_dist.config.reading import Section, is_recorded
from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access

_SECRET = re.compile(
    r"secret|passw|token|credential|auth|cookie|access_key|account_key|customer_?key|^key$|sas|connection_string",
    re.IGNORECASE,
)
"""Names of options that hold credentials."""


_USER_IN_URL = re.compile(r"://[^/?#\s]*@")


class StorageConfig(Section):
    """How URLs are reached. Credentials come from the environment, never from a recipe."""

    retry_seconds: float = Field(120.0, ge=0)
    """How long a failing request is retried, in seconds."""
    connect_seconds: float = Field(10.0, gt=0)
    """How long connecting may take, in seconds."""
    read_seconds: float = Field(30.0, gt=0)
    """How long a store may stay silent in the middle of an answer, in seconds."""
    connections: int = Field(32, ge=1)
    """Largest number of connections from one process to one store."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options for fsspec, by protocol: ``{s3: {endpoint_url: "https://..."}}``."""

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> StorageConfig:
        if "s3a" in self.options and not is_recorded(info):
            raise ConfigError(
                "storage.options.s3a", self.options["s3a"], "s3", "s3a:// is read with storage.options.s3 too."
            )
        for name, value in _entries(self.options, "storage.options"):
            if _SECRET.search(name.rpartition(".")[2]) or (isinstance(value, str) and _USER_IN_URL.search(value)):
                raise ConfigError(
                    name,
                    "a credential",
                    "no credentials in a recipe: every checkpoint holds a copy of it",
                    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment.",
                )
        return self

    @property
    def access(self) -> Access:
        """The settings as the storage layer takes them."""
        return Access(
            retry_seconds=self.retry_seconds,
            connect_seconds=self.connect_seconds,
            read_seconds=self.read_seconds,
            connections=self.connections,
            options=self.options,
        )


def _entries(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The dotted names and the values of all keys in nested mappings and lists."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield f"{path}.{key}", value
        yield from _entries(value, f"{path}.{key}")
