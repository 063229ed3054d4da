"""What ``beit train`` and ``beit tokenizer`` have in common: settings on the command line, and a start."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.commands.options import Group, add_device, add_precision, add_storage, number_of_ranks
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.config.run import RunConfig
    from beit_dist.engine.ranks.distributed import Ranks
    from beit_dist.engine.resolve import Resolved
    from beit_dist.engine.task import Task

_SETTING = re.compile(r"[a-z_][a-z0-9_.]*=")


def add_overrides(group: Group, example: str) -> None:
    """``key=value``."""
    group.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings that replace the recipe's, such as {example}"
    )


def add_computing(parser: CommandParser, ds_config: str | None, built_in: str) -> None:
    """Options of what computes, and how.

    Args:
        ds_config: the DeepSpeed file where none is given.
        built_in: what that is, in words.
    """
    group = parser.add_argument_group("how to compute")
    group.add_argument(
        "--ds_config",
        metavar="NAME",
        default=ds_config,
        help="DeepSpeed's settings, such as the ZeRO stage: zero0 to zero3, which come with beit_dist, or "
        f"the path of a JSON file (default: {built_in})",
    )
    add_device(group)
    add_precision(group, "auto, bf16, fp16 or fp32 (the recipe's precision)")
    group.add_argument(
        "--ranks",
        type=number_of_ranks,
        metavar="N",
        help="start N ranks on this machine, or auto: one for each GPU; with --dry-run, the number to assume "
        "(default: 1, or the launcher's)",
    )
    add_storage(group, nargs=1)
    group.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def add_looking(parser: CommandParser) -> None:
    """Options for a look before a start."""
    group = parser.add_argument_group("a look before the start")
    group.add_argument("--dry-run", action="store_true", help="print the resolved run and start nothing")
    group.add_argument(
        "--measure",
        action="store_true",
        help="with --dry-run: also take some steps, throw them away, and estimate how long the run takes",
    )
    group.add_argument(
        "--preflight",
        action="store_true",
        help="check in a few seconds whether this host can take part in the run, and start nothing; a job does so "
        "once on each of its hosts",
    )


def parse(parser: CommandParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``overrides`` are the settings in their order, those of ``--storage`` first."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Apart from the rest, as --images would take those behind it for sources.
    settings = {at for at in range(1, len(words)) if _is_setting(words[at]) and not words[at - 1].startswith("--")}
    args = parser.parse([word for at, word in enumerate(words) if at not in settings])
    given = {*args.overrides, *(words[at] for at in settings)}
    in_order = [word for word in words if word in given]  # the last of one name holds
    args.overrides = [*(f"storage.{word}" for word in args.storage), *in_order]
    return args


def _is_setting(word: str) -> bool:
    return _SETTING.match(word) is not None and not os.path.exists(word)


def recipe_of(args: argparse.Namespace, kind: str) -> Path | None:
    """The file that ``--config`` names; None where it is left out."""
    from beit_dist.config.recipes import named

    return None if args.config is None else named(kind, args.config)


def ds_config_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the file says that ``--ds_config`` names; None where it is left out."""
    from beit_dist.config.recipes import named
    from beit_dist.engine.resolve import read_ds_config

    return None if args.ds_config is None else read_ds_config(named("deepspeed", args.ds_config))


def ranks_of(args: argparse.Namespace, ranks: Ranks) -> int:
    """The number of ranks to resolve the settings for: the launcher's, or what ``--dry-run`` assumes."""
    from beit_dist.engine.ranks.local import how_many

    return how_many(args.ranks, ranks.world, args.device) if args.dry_run else ranks.world


def as_ranks(args: argparse.Namespace, run: Callable[[Ranks], int]) -> int:
    """Run a command as one of the ranks, or start those that ``--ranks`` asks for; the exit code."""
    from beit_dist.engine.ranks.launchers import as_one_rank, speaks_for_its_host
    from beit_dist.engine.ranks.local import started_here

    code = started_here(args.ranks, dry_run=args.dry_run and not args.measure, device=args.device)
    if code is not None:
        return code
    if sys.stderr.isatty() and speaks_for_its_host():
        print("loading PyTorch and DeepSpeed ...", file=sys.stderr, flush=True)  # which takes some seconds
    return as_one_rank(run)


def import_for(workers: int, pipeline: str, args: argparse.Namespace) -> None:
    """Have what the loader's workers need imported beside what comes next here, DeepSpeed above all.

    Args:
        workers: how many there will be.
        pipeline: the module of what they run.
        args: of the command; a dry run has no workers.
    """
    from beit_dist.stream.workers import start_early

    if workers and (args.measure or not args.dry_run):
        start_early(pipeline)


def preflight(config: RunConfig, args: argparse.Namespace) -> int:
    """Look at this host alone; the exit code."""
    from beit_dist.engine.host import check_host

    check_host(config, args.device)
    return 0


def start(task: Task[Any, Any, Any], resolved: Resolved, args: argparse.Namespace, ranks: Ranks) -> int:
    """Print the resolved run with ``--dry-run``, else train; the exit code."""
    from beit_dist.engine.dry_run import dry_run
    from beit_dist.engine.launch import launch

    if args.dry_run:
        return dry_run(task, resolved, ranks, measured=args.measure)
    if args.measure:
        way_out = "Add --dry-run to measure some steps, or leave out --measure to start the run."
        raise ConfigError("--measure", True, "--dry-run beside it", way_out)
    return launch(task, resolved, ranks)
