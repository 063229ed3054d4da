"""Pre-train a BEiT model; started by ``deepspeed``, ``torchrun``, ``srun``, ``mpirun`` or alone."""

from __future__ import annotations

import sys
from pathlib import Path

# `deepspeed beit_dist/train.py` puts beit_dist/ first on the path, where our modules would hide others of the
# same name; its parent is what lets an uninstalled checkout run.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

import argparse  # noqa: E402

from beit_dist.config import TrainConfig, load_recipe  # noqa: E402
from beit_dist.engine.distributed import Ranks  # noqa: E402
from beit_dist.engine.launchers import as_one_rank  # noqa: E402
from beit_dist.engine.resolve import read_ds_config, resolve  # noqa: E402
from beit_dist.errors import exit_cleanly  # noqa: E402

_EXAMPLES = """\
examples:
  deepspeed --num_gpus 8 beit_dist/train.py --ds_config configs/deepspeed/zero1.json \\
      --config configs/beit_base.yaml data=shards run=runs/base
  torchrun --nproc-per-node 8 -m beit_dist.train --ds_config ... --config ...
  python -m beit_dist.train --ds_config ... --config ... --dry-run --ranks 16

Started again with the same run folder, training goes on from its newest whole checkpoint. A stop signal on any
rank (SIGTERM, SIGINT, SIGUSR1, SIGHUP) saves one and leaves RUN/PREEMPTED. docs/training.md says the rest.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ds_config", required=True, metavar="F.json", help="DeepSpeed's settings, such as the ZeRO stage"
    )
    parser.add_argument("--config", metavar="R.yaml", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and start nothing")
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks that --dry-run assumes")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code is 0 when the run is done or was stopped with a whole checkpoint."""
    args = parse(arguments)
    return as_one_rank(lambda ranks: run(args, ranks))


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Resolve the settings, then print them or train."""
    config = load_recipe(TrainConfig, args.config, args.overrides)
    resolved = resolve(config, read_ds_config(args.ds_config), args.ranks or ranks.world)
    if args.dry_run:
        from beit_dist.engine.dataset import open_data, open_validation
        from beit_dist.engine.dry_run import describe
        from beit_dist.engine.precision import settle_alone
        from beit_dist.engine.resume import saved_precision

        if ranks.rank == 0:
            resolved = settle_alone(resolved, saved_precision(config))
            manifest = open_data(config, check_files=True) if config.data else None
            if manifest is not None:
                open_validation(config, manifest, check_files=True)
            print(describe(config, resolved, manifest))
        return 0

    from beit_dist.engine.launch import launch

    return launch(config, resolved, ranks)


if __name__ == "__main__":
    exit_cleanly(main)
