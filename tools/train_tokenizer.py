"""Train a dVAE, the tokenizer that turns images into grids of visual tokens."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beit_dist.errors import ConfigError, exit_cleanly
from beit_dist.settings import load_recipe
from beit_dist.tokenizer_config import TokenizerRecipe

if TYPE_CHECKING:
    from beit_dist.engine.distributed import Ranks

DESCRIPTION = """\
Train a discrete VAE on images and write it as FILE.safetensors, with FILE.png beside it: held-out images over
their reconstructions from tokens. Look at that picture before sharding a data set with the tokenizer. Any other
name is kept whole: dvae-0.1 has dvae-0.1.png and dvae-0.1.run.

Both are written at the end, whole. Meanwhile FILE.run has checkpoints, the numbers of every step, measurements on
held-out images and pictures. The same command resumes a training that was stopped or killed from its newest whole
checkpoint. A stop signal on any rank (SIGTERM, SIGINT, SIGUSR1, SIGHUP) saves one first.
"""

EXAMPLES = """\
examples:
  python tools/train_tokenizer.py --images corpus/images --out tokenizer.safetensors \\
      --config configs/tokenizer_demo.yaml
  python tools/train_tokenizer.py --images photos.tar --out tokenizer.safetensors \\
      --config configs/tokenizer_small.yaml steps=5000
  deepspeed --num_gpus 8 tools/train_tokenizer.py --ds_config configs/deepspeed/zero1.json \\
      --images 'train-{0000..0099}.tar' --out dvae.safetensors --config configs/tokenizer_dalle.yaml

Exit codes: 0 done, or stopped on request with a checkpoint (FILE.run/DONE or PREEMPTED); 1 failed, for instance
since the codebook collapsed (FILE.run/FAILED says why); 2 the command or the recipe is wrong.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="SRC",
        help="folder, tar, or tars as 'a-{000..009}.tar', here or at a URL",
    )
    parser.add_argument(
        "--sniff",
        action="store_true",
        help="in folders at URLs, too, read the first bytes of files whose suffix is none of the usual ones: a "
        "request for each",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write (.safetensors)")
    parser.add_argument("--config", metavar="YAML", help="recipe; configs/tokenizer_*.yaml (default: built in)")
    parser.add_argument("--run", metavar="DIR", help="the run folder, or its URL (default: FILE.run)")
    parser.add_argument(
        "--ds_config",
        metavar="F.json",
        help="DeepSpeed's settings, such as the ZeRO stage (default: stage 0, fp32 weights)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as steps=2000 or lr=1e-3"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when it is done or was stopped with a whole checkpoint."""
    args = parse(arguments)
    # Before PyTorch starts its threads. Theirs would spin while they wait, which on a CPU that others use too
    # made a training several times slower (measured: 80 steps in 127 s against 51 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from beit_dist.engine.launchers import as_one_rank

    return as_one_rank(lambda ranks: run(args, ranks))


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Resolve the settings, then train."""
    recipe = load_recipe(TokenizerRecipe, args.config, args.overrides)
    choose_accelerator(args.device)

    from beit_dist.engine.resolve import read_ds_config
    from beit_dist.engine.tokenizer.build import resolve
    from beit_dist.engine.tokenizer.launch import Job, launch
    from beit_dist.visual_tokens.weights import beside

    out = Path(args.out)
    recipe = recipe.model_copy(update={"run": args.run or recipe.run or str(beside(out, ".run"))})
    ds_config = None if args.ds_config is None else read_ds_config(args.ds_config)
    resolved = resolve(recipe, ds_config, ranks.world)
    return launch(Job(args.images, out, recipe, resolved, ds_config is None, args.sniff), ranks)


def choose_accelerator(device: str) -> None:
    """Have DeepSpeed take ``--device``; before it is imported.

    ``auto`` is a GPU if there is one, unless ``DS_ACCELERATOR`` says otherwise.

    Raises:
        ConfigError: no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError("--device", device, "auto, cpu or cuda")

    import torch  # here: --help and a wrong key should not wait for it

    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ConfigError("--device", device, "cpu or auto: PyTorch finds no GPU here")
    if device != "auto":
        os.environ["DS_ACCELERATOR"] = device
    elif not present:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


if __name__ == "__main__":
    exit_cleanly(main)
