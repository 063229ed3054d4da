"""What commands that look at many images with a model have in common: options, and the course of the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from beit_dist.commands.options import add_device, add_images, add_storage, at_least, check_out, number_of_ranks
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError, printable

if TYPE_CHECKING:
    from beit_dist.engine.ranks.distributed import Ranks
    from beit_dist.inference.collection import Collection
    from beit_dist.inference.job import Job
    from beit_dist.inference.model import LoadedModel
    from beit_dist.storage.access import Access

_SHOWN = 3
"""Unreadable images that are named."""
_BATCH = 64

RUN_HELP = (
    "run folder, one of its step folders, or its URL; or a file or folder of weights of Hugging Face, timm or "
    "unilm"
)


def add_model(parser: CommandParser, title: str) -> None:
    """RUN and ``--ema``."""
    group = parser.add_argument_group(title)
    parser.add_either(group, "run", "RUN", RUN_HELP)
    group.add_argument("--ema", action="store_true", help="the averaged weights, if the run keeps them")


def add_sources(parser: CommandParser) -> None:
    """``--images`` and how they are reached."""
    group = parser.add_argument_group("which images")
    add_images(group)
    add_storage(group)


def add_work(parser: CommandParser) -> None:
    """How and where the work is done."""
    group = parser.add_argument_group("how and where")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="say how many images there are and what the job takes, and start nothing",
    )
    add_device(group)
    group.add_argument(
        "--ranks",
        type=number_of_ranks,
        metavar="N",
        help="start N ranks on this machine, or auto: one for each GPU (default: 1, or the launcher's)",
    )
    add_batch(group)
    group.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def add_batch(group: argparse._ArgumentGroup) -> None:
    """``--batch`` and ``--workers``."""
    group.add_argument(
        "--batch",
        type=at_least("--batch", 1),
        default=_BATCH,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=at_least("--workers", 1),
        default=2,
        metavar="N",
        help="threads per rank that decode images (default: %(default)s)",
    )


class Given(NamedTuple):
    """What the command line names."""

    model: LoadedModel
    images: Collection
    access: Access


def given(args: argparse.Namespace, access: Access) -> Given:
    """The model and the images.

    Raises:
        UserError: one cannot be used.
    """
    from beit_dist.inference.collection import find_collection
    from beit_dist.inference.loading import load

    if not args.images:
        raise ConfigError("--images", None, "one or more sources of images", "Name a folder, for instance.")
    model = load(args.run, ema=args.ema, access=access)
    return Given(model, find_collection(args.images, access, sniff=args.sniff), access)


def do(args: argparse.Namespace, job_of: Callable[[argparse.Namespace], Job[Any]]) -> int:
    """Do the job as one of the ranks, or start those that ``--ranks`` asks for; the exit code.

    Args:
        args: of the command.
        job_of: what they ask for, with everything looked at that can be wrong.
    """
    from beit_dist.engine.ranks.launchers import as_one_rank
    from beit_dist.engine.ranks.local import started_here

    code = started_here(args.ranks, dry_run=args.dry_run, device=args.device)
    return as_one_rank(lambda ranks: _do(job_of(args), args, ranks)) if code is None else code


def _do(job: Job[Any], args: argparse.Namespace, ranks: Ranks) -> int:
    """As one of the ranks."""
    from tqdm import tqdm

    from beit_dist.probing.ranks import joined

    done = job.is_done  # refuses a file of another job before the ranks join
    if not done:
        if job.target.place.is_local:
            check_out(job.target.place.path / job.target.name)
        job.check_room()
    if args.dry_run:
        print("\n".join((*introduction(job), *_estimated(job, args))), flush=True)
        return 0
    silent = ranks.rank > 0
    with joined(ranks, args.device) as (agreement, device):
        if not silent:
            print("\n".join(introduction(job)), flush=True)
        start = _made(job)
        with tqdm(
            total=len(job.images), initial=start, desc=job.work.made, unit="image", disable=silent or None
        ) as bar:
            unreadable = job.run(agreement, device, lambda images: bar.update(images * ranks.world))
    if not silent:
        print("\n".join(conclusion(job, unreadable, done)), flush=True)
    return 0


def introduction(job: Job[Any]) -> Iterator[str]:
    """What will be done."""
    from beit_dist.engine.durations import counted
    from beit_dist.engine.memory import in_words

    provenance, images = job.work.model.provenance, job.images
    yield f"model   {provenance.name}"
    yield from (f"note    {note}" for note in provenance.notes)
    labelled = f" of {len(images.classes):,} classes" if images.classes else ""
    sources = len(images.files.sources)
    yield f"images  {len(images):,}{labelled} in {counted(sources, 'source')}"
    yield from (f"        {line}" for line in images.left_out)
    titles = ", ".join(column.title for column in job.work.columns())
    yield f"table   {job.target}: {in_words(job.table_bytes)} of {job.work.made} ({titles})"
    if job.is_done:
        yield "done    the file is there, of the same images and weights: nothing is left to do"
    elif made := _made(job):
        yield f"resume  {made:,} images are done: {job.target.parts}"


def conclusion(job: Job[Any], unreadable: int, was_done: bool) -> Iterator[str]:
    """What has been done, or was there before."""
    from beit_dist.engine.durations import counted
    from beit_dist.inference.job import unreadable_of

    made = "there  " if was_done else "wrote  "
    yield f"{made} {job.target}: {counted(len(job.images) - unreadable, 'row')}"
    if not unreadable:
        return
    listed = job.target.place / job.target.unreadable
    yield f"        {counted(unreadable, 'image')} cannot be read: {listed} has the reasons, such as"
    for source, name, reason in unreadable_of(job.target)[:_SHOWN]:
        yield f"        {printable(f'{source}/{name}')}: {reason}"


def _made(job: Job[Any]) -> int:
    """Images of the parts that are there."""
    if job.is_done:
        return len(job.images)
    missing = sum(len(job.parts.rows(part)) for part in job.parts.missing())
    return len(job.images) - missing


def _estimated(job: Job[Any], args: argparse.Namespace) -> Iterator[str]:
    from beit_dist.engine.device import device_of
    from beit_dist.engine.durations import duration
    from beit_dist.engine.memory import in_words
    from beit_dist.engine.ranks.local import how_many
    from beit_dist.inference.estimate import estimate
    from beit_dist.probing.room import free_bytes

    parts = job.parts
    missing = sum(map(parts.bytes_of, parts.missing()))
    free = free_bytes(job.target.place)
    there = "" if free is None else f", {in_words(free)} free"
    yield f"space   {in_words(job.table_bytes + missing)} while it is made{there}"
    if job.is_done:
        return
    found = estimate(job, device_of(args.device))
    ranks, left = how_many(args.ranks, 1, args.device), len(job.images) - _made(job)
    lost = f", {found.unreadable} of which cannot be read" if found.unreadable else ""
    on = f" on {ranks} ranks with as many devices or cores" if ranks > 1 else ""
    yield (
        f"time    about {duration(found.seconds * left / ranks)}{on}: {1000 * found.seconds:,.1f} ms an image "
        f"on one rank ({found.looked_at} looked at{lost})"
    )
