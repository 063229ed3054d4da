"""``beit predict``: what a fine-tuned model says of any number of images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from beit_dist.commands.many_images import add_model, add_sources, add_work, do, given
from beit_dist.commands.options import access_of, add_out, at_least
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.inference.job import Job
    from beit_dist.inference.segmentation import SegmentationModel
    from beit_dist.storage.access import Access

SENTENCE = "Predict classes of images or of their pixels."

EXAMPLES = """\
  beit predict runs/flowers --images photos/ --out predictions.csv
  beit predict runs/flowers --images 'photos-{00..09}.tar' --top 1 --ranks auto \\
      --out predictions.parquet
  beit predict runs/streets --images photos/ --out predicted/ --overlays
"""

MORE = """\
For a classification, F has a row for each image that can be read, source by source and sorted by name in each:
source, name, label (if the images are in class folders, or their source has labels), and the likeliest classes
with their probabilities. For a segmentation, F is a folder with maps/NAME.png, which use the same numbers as the
run's own label maps. F/predictions.json gives their colours, and the share of each class in an image.

Images that cannot be read are listed in F.unreadable.csv, and counted at the end. The same command, on any number
of ranks, continues a job that was stopped or killed.
"""

_SUFFIXES = (".json", ".csv", ".parquet")


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("predict", SENTENCE, EXAMPLES, MORE)
    add_model(parser, "which model")
    add_sources(parser)
    what = parser.add_argument_group("what is written")
    add_out(
        what,
        "F",
        "a file, .json, .csv or .parquet; for a segmentation, a folder. All ranks must reach it",
    )
    what.add_argument(
        "--top",
        type=at_least("--top", 1),
        default=5,
        metavar="K",
        help="largest number of classes per image (default: %(default)s)",
    )
    what.add_argument(
        "--overlays",
        action="store_true",
        help="for a segmentation: also write the images with their maps over them",
    )
    what.add_argument(
        "--quick",
        action="store_true",
        help="for a segmentation: use one scale, even if the run's recipe has several for its last measurement",
    )
    add_work(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Predict; returns the exit code."""
    return do(parser().parse(argv), job_of)


def job_of(args: argparse.Namespace) -> Job[Any]:
    """What the command line asks for, with everything looked at that can be wrong."""
    from beit_dist.inference.classification import ClassificationModel
    from beit_dist.inference.classifying import Classifying
    from beit_dist.inference.job import Job
    from beit_dist.inference.segmentation import SegmentationModel
    from beit_dist.inference.target import target_of

    access = access_of(args)
    model, images, access = given(args, access)
    if isinstance(model, SegmentationModel):
        work, target = _segmenting(args, model, images, access)
        return Job(work, images, target, args.batch, args.workers, access)
    if not isinstance(model, ClassificationModel):
        raise ConfigError(
            "RUN", args.run, "a model that was fine-tuned (this one is pre-trained and has no classes)",
            "Fine-tune it with beit finetune, or take its features with beit embed.",
        )  # fmt: skip
    if args.overlays or args.quick:
        option = "--overlays" if args.overlays else "--quick"
        raise ConfigError(option, args.run, "a segmentation (this run is a classification)", "Leave it out.")
    target = target_of(args.out, _SUFFIXES, access)
    return Job(Classifying(model, args.top), images, target, args.batch, args.workers, access)


def _segmenting(args: argparse.Namespace, model: SegmentationModel, images: Any, access: Access) -> Any:
    from pathlib import Path

    from beit_dist.inference.segmenting import INDEX, Segmenting, Wishes, check_elsewhere
    from beit_dist.inference.target import Target
    from beit_dist.storage.opening import open_place

    out = open_place(args.out, access, "--out")
    if args.out.lower().endswith(_SUFFIXES) or (out.is_local and Path(args.out).is_file()):
        raise ConfigError("--out", args.out, "a folder, for the label maps of a segmentation")
    check_elsewhere(out, images)
    wishes = Wishes(args.top, args.overlays, not args.quick)
    return Segmenting(model, images, out, wishes), Target(out, INDEX, ".json")
