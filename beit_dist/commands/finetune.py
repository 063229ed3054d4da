"""``beit finetune``: fine-tune a pre-trained model on labelled images, as ``beit train`` pre-trains one."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    from beit_dist.config.finetuning import FinetuningConfig
    from beit_dist.engine.ranks.distributed import Ranks
    from beit_dist.engine.task import Task

TASKS = {
    "classification": ("beit_dist.tasks.finetuning.classification", "Classification"),
    "segmentation": ("beit_dist.tasks.finetuning.segmentation", "Segmentation"),
}
"""Module and class of each ``task``."""

SENTENCE = "Fine-tune a model on labelled images or label maps."

EXAMPLES = """\
  beit finetune --config finetune_small --init-from runs/mine \\
      --data labelled/train --test labelled/val --run runs/classes
  beit finetune --config finetune_small --data labels.csv --run runs/scratch
  beit finetune --config segment_small --init-from runs/classes \\
      --data camvid/images/train --test camvid/images/val --run runs/segments
  deepspeed --num_gpus 8 --module beit_dist finetune --ds_config zero1 \\
      --config finetune_base_in1k init_from=beit_base_pt22k.pth \\
      data=imagenet/train validation.data=imagenet/val run=runs/in1k
"""

MORE = """\
--run, --data, --test and --init-from are the settings run=, data=, validation.data= and init_from=.

A classification takes folders named after the classes, a CSV of paths and labels, or WebDataset tars, zips and
parquet files with labels. A segmentation (task=segmentation) takes images/ with label maps beside it in labels/.
The classes come from the data. See docs/finetuning.md for the rest.

Settings of the model that are known from init_from need not be set: its sizes, patches and normalisation.

Exit codes: 0 done, or stopped on request with a checkpoint (RUN/DONE or PREEMPTED); 1 failed (RUN/FAILED says
why); 2 the command or the recipe is wrong.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("finetune", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to train")
    add_config(what, "finetune_small", "built-in settings")
    what.add_argument("--init-from", metavar="RUN", help="a run or a file of weights (the recipe's init_from)")
    what.add_argument("--data", metavar="SRC", help="labelled images to train on (the recipe's data)")
    what.add_argument("--test", metavar="SRC", help="labelled images to measure on (validation.data)")
    what.add_argument("--run", metavar="DIR", help="the run folder, or its URL (the recipe's run)")
    add_overrides(what, "epochs=20 or task=segmentation")
    add_computing(parser, "zero1", "zero1")
    add_looking(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when the run is done or was stopped with a whole checkpoint."""
    args = parse(parser(), argv)
    return as_ranks(args, lambda ranks: run(args, ranks))


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Resolve the settings, then print them or train."""
    from beit_dist.engine.device import choose_accelerator

    choose_accelerator(args.device, ranks.world)  # before anything of DeepSpeed is imported
    config = settings(args)
    if args.preflight:
        return preflight(config, args)
    import_for(config.loader.workers, "beit_dist.stream.labelled.pipeline", args)
    from beit_dist.engine.resolve import resolve

    resolved = resolve(config, ds_config_of(args), ranks_of(args, ranks))
    return start(task_of(config), resolved, args, ranks)


def settings(args: argparse.Namespace) -> FinetuningConfig:
    """The recipe, with what ``init_from`` is known to have where the recipe is silent."""
    from beit_dist.config.finetuning import FinetuningConfig
    from beit_dist.config.reading import filled, read_settings, validate

    flags = given(args, ("run", "data", "precision", "init_from"))
    overrides = [*([] if args.test is None else [f"validation.data={args.test}"]), *args.overrides]
    recipe = recipe_of(args, "finetuning")
    given_settings = read_settings(recipe, overrides, flags=flags)
    return validate(FinetuningConfig, filled(given_settings, {"model": known_backbone(given_settings)}))


def known_backbone(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The backbone's settings as far as they are known: those of the run itself, or of ``init_from``."""
    from beit_dist.config.reading import validate
    from beit_dist.config.storage import StorageConfig
    from beit_dist.engine.resume import newest_saved
    from beit_dist.weights.origin import backbone_of

    run, origin = given.get("run"), given.get("init_from")
    saved = newest_saved(run) if isinstance(run, str) else None
    if saved is not None and saved.manifest.get("kind") in TASKS:
        return dict(saved.manifest["config"]["model"])
    if not isinstance(origin, str):
        return {}
    access = validate(StorageConfig, given.get("storage") or {}).access
    known = dict(backbone_of(origin, access))
    known.pop("block_positions", None)  # a shared table may be copied into each block
    return known


def task_of(config: FinetuningConfig) -> Task[Any, Any, Any]:
    """The task that the settings name."""
    # Now: DeepSpeed looks for its accelerator.
    module, name = TASKS[config.task]
    task: Task[Any, Any, Any] = getattr(importlib.import_module(module), name)(config)
    return task
