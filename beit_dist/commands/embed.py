"""``beit embed``: the features of any number of images, in a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from beit_dist.commands.many_images import add_model, add_sources, add_work, do, given
from beit_dist.commands.options import access_of, add_out
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.images.decoding import Pixels
    from beit_dist.inference.embedding import Embedding
    from beit_dist.inference.job import Job
    from beit_dist.inference.model import LoadedModel

SENTENCE = "Write the features of images to a file."

EXAMPLES = """\
  beit embed runs/base --images photos/ --out features.parquet
  beit embed runs/base --images 'train-{000..099}.tar' --layers 8,12 --token both \\
      --ranks auto --out features.parquet
  beit embed beit-base-patch16-224/ --images s3://bucket/photos --out features.npz
  torchrun --nproc-per-node 8 --module beit_dist embed runs/base --images photos/ \\
      --out /shared/features.parquet
"""

MORE = """\
F has a row for each image that can be read, source by source and sorted by name in each, whatever the number of
ranks. The columns are source, name, label (if the images are in class folders, or their source has labels), and a
vector for each layer, such as mean_8. Images that cannot be read are listed in F.unreadable.csv, and counted at
the end.

The same command, on any number of ranks, continues a job that was stopped or killed: finished parts are in F.parts
until F is written. .npz needs only NumPy; .parquet needs pyarrow: pip install 'beit_dist[parquet]'.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("embed", SENTENCE, EXAMPLES, MORE)
    add_model(parser, "which model")
    add_sources(parser)
    what = parser.add_argument_group("what is written")
    add_out(what, "F", "the file, .parquet or .npz, which all ranks can reach")
    add_features(what)
    add_work(parser)
    return parser


def add_features(group: argparse._ArgumentGroup) -> None:
    """``--layers`` and ``--token``."""
    group.add_argument(
        "--layers",
        metavar="N,N",
        help="blocks whose outputs are taken, counted from 1, or all (default: for a pre-trained model the one at "
        "two thirds of the depth, such as 8 of 12; for a fine-tuned one the last)",
    )
    group.add_argument(
        "--token",
        choices=("mean", "class", "both"),
        default="mean",
        metavar="T",
        help="mean (of the patches), class (the class token) or both (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Embed; returns the exit code."""
    return do(parser().parse(argv), job_of)


def job_of(args: argparse.Namespace) -> Job[Pixels]:
    """What the command line asks for, with everything looked at that can be wrong."""
    from beit_dist.inference.job import Job
    from beit_dist.inference.target import target_of

    access = access_of(args)
    target = target_of(args.out, (".parquet", ".npz"), access)
    model, images, access = given(args, access)
    return Job(embedding_of(args, model), images, target, args.batch, args.workers, access)


def embedding_of(args: argparse.Namespace, model: LoadedModel) -> Embedding:
    """What ``--layers`` and ``--token`` ask for."""
    from beit_dist.inference.embedding import Embedding
    from beit_dist.probing.features import layers_of

    if args.layers is None:
        layers: tuple[int, ...] = (model.default_layer,)
    else:
        chosen = None if args.layers == "all" else numbers(args.layers)
        layers = layers_of(model.prepare.config.depth, chosen, "--layers")
    return Embedding(model, layers, args.token)


def numbers(text: str) -> list[int]:
    """The layers that were asked for."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError("--layers", text, "numbers with commas between them, such as 6,9,12, or all") from None
