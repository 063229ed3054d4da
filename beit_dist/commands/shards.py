"""``beit shards``: the offline job, images to shards of patches and visual tokens."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.commands.options import (
    access_of,
    add_device,
    add_images,
    add_out,
    add_precision,
    add_storage,
    given,
)
from beit_dist.commands.parsing import CommandParser, spelling
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.shards.manifest import Manifest
    from beit_dist.storage.access import Access
    from beit_dist.storage.place import Place

SENTENCE = "Turn images into shards of patches and tokens for training."

EXAMPLES = """\
  one machine does everything:
    beit shards --images photos/ --out shards/ --tokenizer dvae.safetensors

  with 2% of the images held out for measurements; first, show what it would take:
    beit shards --images photos/ --out shards/ --tokenizer dvae.safetensors \\
        --held-out 2% --dry-run
    beit shards --images photos/ --out shards/ --tokenizer dvae.safetensors --held-out 2%

  four views of images in tars, 16 workers of a job array (first, in each task, and last):
    beit shards --images 'train-{000..099}.tar' --out shards/ --index-only
    BEIT_WORKERS=16 beit shards --images 'train-{000..099}.tar' --out shards/ \\
        --tokenizer dvae.safetensors --views 4
    beit shards --out shards/ --finish

  from several sources: ImageNet's tar of tars, a folder, and all zips of another:
    beit shards --images ILSVRC2012_img_train.tar photos/ 'more/*.zip' --out shards/ \\
        --tokenizer dvae.safetensors

  from a bucket into a bucket, with metrics for node_exporter; credentials are in the
  environment:
    beit shards --images s3://photos/2024/ --out s3://shards/photos --index-only
    beit shards --images s3://photos/2024/ --out s3://shards/photos \\
        --tokenizer s3://models/dvae.safetensors --index 3 --count 16 \\
        --metrics-textfile /var/lib/node_exporter/textfile/tokenize-3.prom
    beit shards --out s3://shards/photos --finish
"""

MORE = """\
Training reads the shards without decoding anything. If a worker was killed, run it again with the same command;
finished shards are kept. The bytes are the same for any number of workers, on one device type, thread count and
set of versions.
"""

SETTINGS: dict[str, Any] = {
    "views": 1,
    "image_size": 224,
    "patch_size": 16,
    "shard_samples": 4096,
    "seed": 0,
    "augment": "random",
    "batch": 64,
    "precision": "fp32",
    "pixel_version": 1,
    "crop_area": 0.08,
}
"""Settings that decide the bytes, and their defaults; --finish compares those that are given with the job's."""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("shards", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to read and write")
    add_images(what)
    what.add_argument(
        "--tokenizer", metavar="FILE", help="the dVAE that makes the tokens (.safetensors), here or at a URL"
    )
    add_out(what, "DIR", "folder of the data set, here or at a URL such as s3://bucket/x")
    what.add_argument(
        "--held-out",
        metavar="SHARE",
        help="images to keep out of training: a number, or a share such as 2%%. They become a data set of "
        "their own in DIR/held-out, on which runs are measured (default: none)",
    )
    add_storage(what)
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be read and written and how long it would take, and make no shards",
    )
    what.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="with --dry-run: also measure each stage for a second or two on a few images, and say what limits "
        "the job and how long it takes (default: yes)",
    )
    _add_settings(parser)
    _add_work(parser)
    beside = parser.add_argument_group("metrics")
    beside.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="serve this worker's Prometheus metrics on this port; 0 takes any free one",
    )
    beside.add_argument(
        "--metrics-address",
        metavar="ADDR",
        default="127.0.0.1",
        help="address to serve them on; 0.0.0.0 lets other hosts read them (default: %(default)s)",
    )
    beside.add_argument(
        "--metrics-textfile",
        type=Path,
        metavar="FILE.prom",
        help="write them to a file in node_exporter's textfile folder every 15 s; one file for each worker",
    )
    return parser


def _add_settings(parser: CommandParser) -> None:
    group = parser.add_argument_group("what the shards hold (the same for all workers of a job)")
    add = group.add_argument
    add("--views", type=int, help="augmented versions of each image, used epoch by epoch (default 1)")
    add("--image-size", type=int, help="side of the training image in pixels (default 224)")
    add("--patch-size", type=int, help="side of a patch; the tokenizer sees 8 px for each patch (default 16)")
    add(
        "--augment",
        choices=("random", "center"),
        help="BEiT's jitter, flip and random crop, or a plain centre crop "
        "for validation and pictures (default random)",
    )
    add(
        "--crop-area",
        type=float,
        metavar="SHARE",
        help="smallest share of an image's area that a random crop takes (default 0.08, as in the original; "
        "images of about 32 px need more)",
    )
    add("--shard-samples", type=int, help="images in a shard (default 4096: 631 MB)")
    add("--seed", type=int, help="seed of the order, crops, flips and jitter (default 0)")
    add(
        "--pixel-version",
        type=int,
        choices=(1, 2),
        help="how views are made: 1, by Pillow (default), or 2, up to twice as fast, which rounds differently and "
        "shrinks large JPEGs while it decodes them",
    )
    add(
        "--decoder",
        choices=("pillow", "simplejpeg"),
        default="pillow",
        help="decoder of JPEGs: pillow (default), or simplejpeg, which is faster and gives the same pixels; "
        "pip install 'beit_dist[jpeg]'",
    )
    add("--batch", type=int, help="images that the encoder processes at a time (default 64)")
    add_precision(
        group,
        "precision of the encoder's residual paths, which do most of its work: fp32, fp16 or bf16. fp32, the "
        "default, rounds least; the others are faster on devices that support them, and change a few near-tied "
        "tokens",
        ("fp32", "fp16", "bf16"),
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the encoder, which rounds differently (default: as the job in this folder began; for a new "
        "job, on a GPU if there is a C compiler)",
    )


def _add_work(parser: CommandParser) -> None:
    group = parser.add_argument_group("how the work is split")
    add = group.add_argument
    add(
        "--index",
        type=int,
        help="this worker's number, from 0; by default its task id in the SLURM array, or its index in Kubernetes",
    )
    add("--count", type=int, help="number of workers; by default $BEIT_WORKERS, else 1")
    add("--index-only", action="store_true", help="only freeze the list of images; needed before several workers")
    add("--finish", action="store_true", help="only check that all shards are there, and write the manifest")
    add("--no-finish", action="store_true", help="with a single worker: do not finish the data set at the end")
    add(
        "--max-rejected",
        default="1%",
        metavar="LIMIT",
        help="fail if more images than this cannot be used: a number, or a share such as 5%% (default 1%%)",
    )
    add_device(group)
    add(
        "--decoders",
        type=int,
        help="decoding processes, shared by the encoders (default: one for each core, at most 16 per encoder)",
    )
    add(
        "--encoders",
        type=int,
        default=1,
        metavar="N",
        help="encoding processes on this host, each a worker for a part of its shards; they take the GPUs in "
        "turn (default 1)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step of the job, or all of them; returns the exit code."""
    arguments = parser().parse(argv)
    if arguments.measure is not None and not arguments.dry_run:
        raise ConfigError("--measure", arguments.measure, "--dry-run beside it")
    if arguments.finish and arguments.dry_run:
        raise ConfigError("--dry-run", True, "a start that makes shards", "Leave --finish out.")
    if not (arguments.finish or arguments.images):
        raise ConfigError("--images", None, "folders, tars, zips or parquet files of images")
    from beit_dist.storage.opening import open_place
    from beit_dist.tokenizing.storage_errors import storage_errors

    access = access_of(arguments)
    out = open_place(arguments.out, access)
    with storage_errors(out):
        if arguments.finish:
            return _finish(arguments, out, access)
        freezes = arguments.index_only and not arguments.dry_run
        return _freeze(arguments, out, access) if freezes else _work(arguments, out, access)


def _freeze(arguments: argparse.Namespace, out: Place, access: Access) -> int:
    from beit_dist.tokenizing.freeze import freeze

    seed = arguments.seed or SETTINGS["seed"]
    header = freeze(arguments.images, out, seed, access, sniff=arguments.sniff, held_out=arguments.held_out)
    split = f", {header.held_out} of them held out" if header.held_out else ""
    print(f"{out}: {header.entries} images {'with' if header.labels else 'without'} labels are frozen{split}")
    return 0


def _work(arguments: argparse.Namespace, out: Place, access: Access) -> int:
    if arguments.tokenizer is None:
        raise ConfigError("--tokenizer", None, "a tokenizer's file", "beit tokenizer trains one.")
    from beit_dist.tokenizing.rejected import summary
    from beit_dist.tokenizing.run import work
    from beit_dist.tokenizing.starting import Options

    options = Options(
        images=tuple(arguments.images),
        out=out,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        decoders=arguments.decoders,
        index=arguments.index,
        count=arguments.count,
        max_rejected=arguments.max_rejected,
        finish=not arguments.no_finish,
        access=access,
        metrics_port=arguments.metrics_port,
        metrics_address=arguments.metrics_address,
        metrics_textfile=arguments.metrics_textfile,
        sniff=arguments.sniff,
        held_out=arguments.held_out,
        decoder=arguments.decoder,
        compiled=arguments.compile,
        encoders=arguments.encoders,
        **(SETTINGS | given(arguments, tuple(SETTINGS))),
    )
    if arguments.dry_run:
        from beit_dist.tokenizing.dry_run import describe

        for line in describe(options, os.environ, measure=arguments.measure is not False):
            print(line, flush=True)
        return 0
    outcome = work(options, os.environ)
    if outcome.manifest is not None and outcome.made == 0 and outcome.images == 0:
        print("already complete: ", end="")
    if outcome.manifest is not None:
        _report(out, outcome.manifest)
        return 0
    print("\n".join(summary(outcome.rejected)), end="\n" if outcome.rejected else "")
    print(
        f"worker {outcome.index} of {outcome.count}: {outcome.made} shards made, {outcome.kept} kept, "
        f"{outcome.images} images, {len(outcome.rejected)} rejected. When all workers are done: "
        f"{spelling('shards').alone} --out {shlex.quote(str(out))} --finish"
    )
    return 0


def _finish(arguments: argparse.Namespace, out: Place, access: Access) -> int:
    from beit_dist.tokenizing.finish import finish, finished
    from beit_dist.tokenizing.worker_index import worker_count

    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.tokenizer is not None:
        from beit_dist.tokenizing.tokenizer_file import tokenizer_at
        from beit_dist.weights.tokenizer_files import tokenizer_digest

        with tokenizer_at(arguments.tokenizer, access) as path:
            settings["tokenizer"] = tokenizer_digest(path)
    manifest = finished(out, settings)
    if manifest is not None:
        print("already complete: ", end="")
    if manifest is None:
        manifest = finish(out, settings, arguments.max_rejected, worker_count(arguments.count, os.environ))
    _report(out, manifest)
    return 0


def _report(out: Place, manifest: Manifest) -> None:
    from beit_dist.tokenizing.describing import last_lines

    print("\n".join(last_lines(out, manifest)))
