"""``beit train``: pre-train a BEiT model; alone, with ``--ranks`` of its own, or by any launcher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from beit_dist.commands.options import add_config, given
from beit_dist.commands.parsing import CommandParser
from beit_dist.commands.training import (
    add_computing,
    add_looking,
    add_overrides,
    as_ranks,
    ds_config_of,
    import_for,
    parse,
    preflight,
    ranks_of,
    recipe_of,
    start,
)

if TYPE_CHECKING:
    from beit_dist.engine.ranks.distributed import Ranks

SENTENCE = "Pre-train a BEiT model on shards of images and tokens."

EXAMPLES = """\
  beit train --config beit_small --data shards --run runs/mine
  beit train --config beit_base --data shards --run runs/base --ranks auto
  beit train --config beit_small --data shards --run runs/mine \\
      --dry-run --ranks 4
  deepspeed --num_gpus 8 --module beit_dist train --ds_config zero1 \\
      --config beit_base --data shards --run runs/base optimizer.lr=1e-3
  torchrun --nproc-per-node 8 --module beit_dist train \\
      --config beit_base data=shards run=runs/base
"""

MORE = """\
--run and --data are the settings run= and data=. Under torchrun write run=, because it takes --run for its own
--run-path.

If you start it again with the same run folder, training continues from the newest complete checkpoint. A stop
signal on any rank (SIGTERM, SIGINT, SIGUSR1, SIGHUP) saves a checkpoint and leaves RUN/PREEMPTED. See
docs/running.md for the rest.

Exit codes: 0 done, or stopped on request with a checkpoint (RUN/DONE or PREEMPTED); 1 failed (RUN/FAILED says
why); 2 the command or the recipe is wrong.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("train", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to train")
    add_config(what, "beit_small", "built-in settings")
    what.add_argument("--data", metavar="DIR", help="folder or URL of the shards (the recipe's data)")
    what.add_argument("--run", metavar="DIR", help="the run folder, or its URL (the recipe's run)")
    add_overrides(what, "epochs=20 or optimizer.lr=1e-3")
    add_computing(parser, "zero1", "zero1")
    add_looking(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when the run is done or was stopped with a whole checkpoint."""
    args = parse(parser(), argv)
    return as_ranks(args, lambda ranks: run(args, ranks))


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Resolve the settings, then print them or train."""
    from beit_dist.config.pretraining import PretrainingConfig
    from beit_dist.config.reading import load_recipe
    from beit_dist.engine.device import choose_accelerator
    from beit_dist.engine.resolve import resolve

    flags = given(args, ("run", "data", "precision"))
    config = load_recipe(PretrainingConfig, recipe_of(args, "pretraining"), args.overrides, flags=flags)
    if args.preflight:
        return preflight(config, args)
    import_for(config.loader.workers, "beit_dist.stream.pipeline", args)
    choose_accelerator(args.device, ranks.world)
    resolved = resolve(config, ds_config_of(args), ranks_of(args, ranks))  # imports DeepSpeed, which looks for one

    from beit_dist.tasks.pretraining.task import Pretraining

    return start(Pretraining(config), resolved, args, ranks)
