"""Options that mean the same in every command that has them, and what is made of their values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.errors import ConfigError

if TYPE_CHECKING:  # so that --help need not load pydantic
    from beit_dist.storage.access import Access

Group = argparse._ArgumentGroup
"""What ``parser.add_argument_group`` returns."""


def at_least(option: str, least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number.

    Raises:
        ConfigError: when it is called with anything else, or with less than ``least``.
    """

    def number(text: str) -> int:
        expected = f"a whole number, {least} or more"
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(option, text, expected) from None
        if value < least:
            raise ConfigError(option, value, expected)
        return value

    return number


def number_of_ranks(text: str) -> int | str:
    """The type of ``--ranks``: a number, or ``auto``."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of ranks from 1, or auto")
    return int(text)


def add_images(group: Group) -> None:
    """``--images`` and how to look at them."""
    group.add_argument(
        "--images",
        nargs="+",
        metavar="SRC",
        help="folders (with all below them), tars, zips or parquet files, here or at URLs; {000..009} and '*' "
        "expand; a URL ending in .tar, .zip or .parquet is such a file, any other a folder",
    )
    group.add_argument(
        "--sniff",
        action="store_true",
        help="in folders at URLs too, look into files whose suffix is not one of the usual ones; takes one "
        "request per file",
    )


def add_config(group: Group, example: str, default: str) -> None:
    """``--config``."""
    group.add_argument(
        "--config",
        metavar="NAME",
        help=f"the recipe: the name of one that comes with beit_dist, such as {example}, or the path of a YAML "
        f"file (default: {default})",
    )


def add_out(group: Group, metavar: str, help: str, *, required: bool = True) -> None:
    """``--out``."""
    group.add_argument("--out", metavar=metavar, required=required, help=help)


def add_device(group: Group) -> None:
    """``--device``."""
    group.add_argument(
        "--device",
        metavar="D",
        default="auto",
        help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)",
    )


def add_precision(group: Group, help: str, choices: Sequence[str] | None = None) -> None:
    """``--precision``."""
    group.add_argument("--precision", choices=choices, metavar="P", help=help)


def add_samples(group: Group, default: int, help: str) -> None:
    """``--samples``."""
    group.add_argument(
        "--samples",
        type=at_least("--samples", 1),
        default=default,
        metavar="N",
        help=f"{help} (default: %(default)s)",
    )


def add_runs(group: Group) -> None:
    """One run or several; :func:`runs_of` reads them."""
    group.add_argument(
        "runs", metavar="RUN", nargs="*", help="run folder, one of its step folders, or a URL; or several of them"
    )
    group.add_argument("--run", metavar="RUN", action="append", default=[], help="the same as RUN")


def runs_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """What was named for :func:`add_runs`; without any, the parser's error."""
    runs = [*arguments.runs, *arguments.run]
    if not runs:
        parser.error("expected RUN or --run RUN")
    return runs


def add_their_tokenizer(group: Group) -> None:
    """``--tokenizer`` of shards that are there."""
    group.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer that made the shards (default: the recipe's, or tokenizer.safetensors beside the data)",
    )


def check_out(out: str | Path) -> None:
    """Refuse a file of ``--out`` that cannot be written, before the work instead of after.

    Raises:
        ConfigError: its folder is none, or takes no files; or it would be made in such a folder.
    """
    from beit_dist.storage.durable import check_takes_files

    folder = Path(out).absolute().parent
    there = next(above for above in (folder, *folder.parents) if above.exists())
    try:
        check_takes_files(there)
    except OSError as error:
        raise ConfigError("--out", str(out), f"a file that can be written ({there}: {error.strerror})") from None


def add_json(group: Group) -> None:
    """``--json``; for :func:`write_json`."""
    group.add_argument(
        "--json", metavar="F", help="write the facts as JSON to a file; - prints the JSON and nothing else"
    )


def write_json(where: str, facts: Any) -> None:
    """Do what ``--json`` asks for.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(facts, indent=1) + "\n"
    if where == "-":
        print(text, end="", flush=True)
        return
    try:
        Path(where).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--json", where, f"a file that can be written ({error.strerror})") from None


def add_storage(group: Group, nargs: str | int = "+") -> None:
    """``--storage``; for :func:`access_of`."""
    group.add_argument(
        "--storage",
        nargs=nargs,
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="how URLs are reached: retry_seconds, connect_seconds, read_seconds, connections, "
        "options.s3.anon=true and other options of fsspec. Credentials come from the environment only",
    )


def access_of(arguments: argparse.Namespace) -> Access:
    """What was said with ``--storage``, over the defaults.

    Raises:
        ConfigError: an unknown setting, or a value of the wrong kind.
    """
    from beit_dist.config.reading import load_recipe
    from beit_dist.config.storage import StorageConfig

    return load_recipe(StorageConfig, None, arguments.storage).access


def given(arguments: argparse.Namespace, names: Mapping[str, str] | Sequence[str]) -> dict[str, Any]:
    """Settings of a recipe that were given as options.

    Args:
        names: options; with the settings that they stand for where these have other names.
    """
    settings = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    values = {setting: getattr(arguments, option) for option, setting in settings.items()}
    return {setting: value for setting, value in values.items() if value is not None}
