"""The option ``--storage`` of the commands that read or write at URLs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that --help need not load pydantic
    from beit_dist.storage.access import Access


def add_storage_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command's user say how URLs are reached."""
    parser.add_argument(
        "--storage",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="how URLs are reached: retry_seconds, connect_seconds, read_seconds, connections, s3_reader=obstore, "
        "options.s3.anon=true and others of fsspec. Credentials come from the environment only",
    )


def access_of(arguments: argparse.Namespace) -> Access:
    """What was said with ``--storage``, over the defaults.

    Raises:
        ConfigError: an unknown setting, or a value of the wrong kind.
    """
    from beit_dist.config import StorageConfig
    from beit_dist.settings import load_recipe

    return load_recipe(StorageConfig, None, arguments.storage).access
