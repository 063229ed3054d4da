"""``beit tokenizer``: train a dVAE, which turns images into grids of visual tokens."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beit_dist.commands.options import add_config, add_images, add_out, given
from beit_dist.commands.parsing import CommandParser
from beit_dist.commands.training import (
    add_computing,
    add_looking,
    add_overrides,
    as_ranks,
    ds_config_of,
    parse,
    preflight,
    ranks_of,
    recipe_of,
    start,
)

if TYPE_CHECKING:
    from beit_dist.engine.ranks.distributed import Ranks

SENTENCE = "Train the tokenizer that turns images into visual tokens."

EXAMPLES = """\
  beit tokenizer --images photos/ --out tokenizer.safetensors \\
      --config tokenizer_small
  beit tokenizer --images photos.tar --out tokenizer.safetensors \\
      --config tokenizer_small steps=5000 --dry-run
  deepspeed --num_gpus 8 --module beit_dist tokenizer --ds_config zero1 \\
      --images 'train-{0000..0099}.tar' more/ --out dvae.safetensors \\
      --config tokenizer_dalle
"""

MORE = """\
The tokenizer is a discrete VAE. It is written as FILE.safetensors, with FILE.png beside it: held-out images above
their reconstructions from tokens. Look at that picture before sharding a data set with the tokenizer. A name
without this suffix is kept as it is: dvae-0.1 has dvae-0.1.png and dvae-0.1.run.

Both files are written at the end, in one piece. Until then, FILE.run holds checkpoints, the numbers of every step,
measurements on held-out images, and pictures. If the training was stopped or killed, the same command resumes it
from its newest complete checkpoint. A stop signal on any rank (SIGTERM, SIGINT, SIGUSR1, SIGHUP) saves one first.

Exit codes: 0 done, or stopped on request with a checkpoint (FILE.run/DONE or PREEMPTED); 1 failed, for instance
because the codebook collapsed (FILE.run/FAILED says why); 2 the command or the recipe is wrong.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("tokenizer", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to train")
    add_config(what, "tokenizer_small", "built-in settings")
    add_images(what)
    add_out(what, "FILE", "the file to write (.safetensors)")
    what.add_argument("--run", metavar="DIR", help="the run folder, or its URL (default: FILE.run)")
    add_overrides(what, "steps=2000 or optimizer.lr=1e-3")
    add_computing(parser, None, "stage 0, fp32 weights")
    add_looking(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when it is done or was stopped with a whole checkpoint."""
    args = parse(parser(), argv)
    # Before PyTorch starts its threads. Theirs would spin while they wait, which on a CPU that others use too
    # made a training several times slower (measured: 80 steps in 127 s against 51 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return as_ranks(args, lambda ranks: run(args, ranks))


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Resolve the settings, then print them or train."""
    from beit_dist.config.reading import load_recipe
    from beit_dist.config.tokenizer import TokenizerConfig
    from beit_dist.engine.device import choose_accelerator
    from beit_dist.engine.resolve import resolve
    from beit_dist.weights.tokenizer_files import beside

    out = Path(args.out)
    flags = given(args, {"run": "run", "images": "data", "precision": "precision"})
    defaults = {"run": str(beside(out, ".run"))}
    recipe = recipe_of(args, "tokenizer")
    config = load_recipe(TokenizerConfig, recipe, args.overrides, flags=flags, defaults=defaults)
    if args.preflight:
        return preflight(config, args)
    ds_config = ds_config_of(args)
    choose_accelerator(args.device, ranks.world)
    resolved = resolve(config, ds_config, ranks_of(args, ranks))  # imports DeepSpeed, which looks for one

    from beit_dist.tasks.tokenizer.task import TokenizerTraining

    task = TokenizerTraining(config, out, built_in=ds_config is None, sniff=args.sniff)
    return start(task, resolved, args, ranks)
