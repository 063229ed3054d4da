"""``beit probe``: what the frozen features of a model are worth for a classification, layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from beit_dist.commands.options import (
    access_of,
    add_device,
    add_json,
    add_out,
    add_storage,
    at_least,
    number_of_ranks,
    write_json,
)
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.engine.ranks.distributed import Ranks
    from beit_dist.probing.job import Job
    from beit_dist.storage.access import Access
    from beit_dist.storage.place import Place

SENTENCE = "Measure how good a model's frozen features are, layer by layer."

EXAMPLES = """\
  beit probe runs/base --data imagenet/train --test imagenet/val
  beit probe runs/base --data photos/ --layers 6,9,12 --samples 20000 --ema
  beit probe runs/base --data 'train-{000..099}.tar' --test 'val-{000..009}.tar' \\
      --ranks auto --json probe.json
  beit probe beit-base-patch16-224/ --data imagenet/train --test imagenet/val --out probe/
  torchrun --nproc-per-node 8 --module beit_dist probe runs/base --data imagenet/train \\
      --test imagenet/val --out /shared/probe
"""

MORE = """\
Features are the class token and the mean of the patches' tokens, of every layer, from one pass over the images.
Each layer gets a linear classifier (multinomial logistic regression with L2) and 20 nearest neighbours. The
strength of the L2 and the layer are chosen on a held-out fifth of the training images; then the classifier is
fitted to all training images. The test images are not used to choose anything.

Features are kept in OUT until the probe is done: the same command, on any number of ranks, continues a probe that
was stopped or killed.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("probe", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to probe")
    parser.add_either(
        what,
        "run",
        "RUN",
        "run folder of a pre-training or fine-tuning, one of its step folders, or its URL; or a file or folder of "
        "weights of Hugging Face, timm or unilm",
    )
    what.add_argument("--ema", action="store_true", help="the averaged weights, if the run keeps them")
    what.add_argument(
        "--layers",
        metavar="N,N",
        help="blocks whose outputs are probed, counted from 1 (default: all)",
    )
    images = parser.add_argument_group("with which images")
    images.add_argument(
        "--data",
        nargs="+",
        metavar="SRC",
        help="images with labels to fit to: folders of class folders, CSV files of paths and labels, tars, zips "
        "or parquet files, here or at URLs",
    )
    images.add_argument(
        "--test",
        nargs="+",
        metavar="SRC",
        help="images of the same classes to test on (default: a fifth of --data, the same one every time)",
    )
    images.add_argument(
        "--samples",
        type=at_least("--samples", 1),
        metavar="N",
        help="largest number of images of --data; chosen at random, the same ones every time (default: all)",
    )
    add_storage(images)
    _add_work(parser)
    return parser


def _add_work(parser: CommandParser) -> None:
    how = parser.add_argument_group("how and where")
    add_out(how, "DIR", "folder for the features, which all ranks can reach (default: RUN/probe)", required=False)
    add_json(how)
    add_device(how)
    how.add_argument(
        "--ranks",
        type=number_of_ranks,
        metavar="N",
        help="start N ranks on this machine, or auto: one for each GPU (default: 1, or the launcher's)",
    )
    how.add_argument(
        "--batch",
        type=at_least("--batch", 1),
        default=64,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    how.add_argument(
        "--workers",
        type=at_least("--workers", 1),
        default=2,
        metavar="N",
        help="threads per rank that decode images (default: %(default)s)",
    )
    how.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def main(argv: Sequence[str] | None = None) -> int:
    """Probe; returns the exit code."""
    args = parser().parse(argv)
    if not args.data:
        raise ConfigError("--data", None, "images with labels", "Give folders of class folders, for instance.")
    from beit_dist.engine.ranks.launchers import as_one_rank
    from beit_dist.engine.ranks.local import started_here

    code = started_here(args.ranks, dry_run=False, device=args.device)
    return as_one_rank(lambda ranks: run(args, ranks)) if code is None else code


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Probe as one of the ranks."""
    from tqdm import tqdm

    from beit_dist.probing.job import result_of
    from beit_dist.probing.ranks import joined

    job = job_of(args)
    silent = ranks.rank > 0 or args.json == "-"
    with joined(ranks, args.device) as (agreement, device):
        if not silent:
            print("\n".join(introduction(job)), flush=True)
        with tqdm(total=len(job.pictures.images), desc="features", unit="image", disable=silent or None) as bar:
            scores = job.run(agreement, device, lambda images: bar.update(images * ranks.world))
    if ranks.rank:
        return 0
    result = result_of(job, scores)
    job.parts.remove()
    if not silent:
        print("\n".join(lines(result)), flush=True)
    if args.json:
        write_json(args.json, result)
    return 0


def job_of(args: argparse.Namespace) -> Job:
    """What the command line asks for, with everything looked at that can be wrong."""
    from beit_dist.config.labelled import LabelledLoaderConfig
    from beit_dist.images.labelled.images import find_labelled
    from beit_dist.probing.features import layers_of
    from beit_dist.probing.job import Job
    from beit_dist.probing.origin import open_origin
    from beit_dist.probing.pictures import pictures_of

    access = access_of(args)
    out = out_of(args, access)
    origin = open_origin(args.run, ema=args.ema, access=access)
    layers = layers_of(origin.config.depth, numbers(args.layers), "--layers")
    training = find_labelled(args.data, access, field="--data")
    test = find_labelled(args.test, access, classes=training.classes, field="--test") if args.test else None
    pictures = pictures_of(training, test, args.samples, "--data")
    loader = LabelledLoaderConfig(workers=args.workers)
    job = Job(origin, pictures, layers, out, args.batch, loader, access)
    job.check_space()
    return job


def out_of(args: argparse.Namespace, access: Access) -> Place:
    """``--out``, or ``probe`` in the run folder."""
    from beit_dist.checkpoints.layout import MANIFEST
    from beit_dist.storage.opening import open_place

    if args.out is not None:
        return open_place(args.out, access, "--out")
    run = open_place(args.run, access)
    if run.exists(MANIFEST) or not run.list("checkpoints"):
        raise ConfigError("--out", None, "a folder for the features, as no run folder is named")
    return run / "probe"


def numbers(text: str | None) -> list[int] | None:
    """The layers that were asked for."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError("--layers", text, "numbers with commas between them, such as 6,9,12") from None


def introduction(job: Job) -> Iterator[str]:
    """What will be done."""
    from beit_dist.engine.memory import in_words

    parted, parts = job.pictures.split, job.parts
    yield f"model   {job.origin.name}"
    yield from (f"note    {note}" for note in job.origin.notes)
    yield (
        f"images  {len(parted.training):,} to fit to, {len(parted.choice):,} of them to choose on; "
        f"{len(parted.test):,} to test on; {len(job.pictures.images.classes):,} classes"
    )
    missing = len(parts.missing())
    kept = f"; {len(parts) - missing} of {len(parts)} parts are there already" if missing < len(parts) else ""
    yield f"layers  {', '.join(map(str, job.layers))}: {in_words(parts.bytes)} of features in {job.out}{kept}"


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for a person."""
    yield f"{'layer':>5}  {'linear':>8} {'held out':>9} {'L2':>6}   {'k-NN':>8} {'held out':>9}"
    for layer in result["layers"]:
        linear, knn = layer["linear"], layer["knn"]
        yield (
            f"{layer['layer']:>5}  {linear['test']:>8.1%} {linear['choice']:>9.1%} {linear['l2']:>6g}   "
            f"{knn['test']:>8.1%} {knn['choice']:>9.1%}"
        )
    for name, what in (("linear", "linear"), ("knn", "k-NN")):
        best = result[name]
        yield f"{what:<7} {best['accuracy']:.1%} of the test images, with layer {best['layer']}"
    yield f"commonest class {result['commonest_class']:.1%}"
