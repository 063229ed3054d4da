"""The offline job: images to shards of patches and visual tokens."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.errors import ConfigError, exit_cleanly
from beit_dist.storage_option import access_of, add_storage_argument

# Imports of the work itself stay inside functions: decoding processes import this file too, and need no torch.
if TYPE_CHECKING:
    from beit_dist.data.shards import Manifest
    from beit_dist.storage.access import Access
    from beit_dist.storage.place import Place

DESCRIPTION = """\
Turn images into shards that training reads without decoding anything: augment, tokenize, write.
A worker that was killed is run again with the same command; finished shards are kept. The bytes are the same for
any number of workers, on one device type, thread count and set of versions.
"""

EXAMPLES = """\
examples:
  one machine does everything:
    python tools/shard_tokens.py --images photos/ --out shards/ --tokenizer dvae.safetensors

  four views of images in tars, 16 workers of a job array:
    python tools/shard_tokens.py --images 'train-{000..099}.tar' --out shards/ --index-only     (once, before)
    BEIT_WORKERS=16 python tools/shard_tokens.py --images 'train-{000..099}.tar' --out shards/ \\
        --tokenizer dvae.safetensors --views 4                                                  (in each task)
    python tools/shard_tokens.py --out shards/ --finish                                         (once, after)

  from a bucket into a bucket, with what node_exporter can show of each worker; credentials are in the environment:
    python tools/shard_tokens.py --images s3://photos/2024/ --out s3://shards/photos --index-only
    python tools/shard_tokens.py --images s3://photos/2024/ --out s3://shards/photos \\
        --tokenizer s3://models/dvae.safetensors --index 3 --count 16 \\
        --metrics-textfile /var/lib/node_exporter/textfile/tokenize-3.prom
    python tools/shard_tokens.py --out s3://shards/photos --finish
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
}
"""Settings that decide the bytes, and their defaults; --finish compares those that are given with the job's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step of the job, or all of them; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if not (arguments.finish or arguments.images):
        raise ConfigError("--images", None, "folders or tars of images")
    from beit_dist.storage.opening import open_place
    from beit_dist.tokenizing.storage_errors import storage_errors

    access = access_of(arguments)
    out = open_place(arguments.out, access)
    with storage_errors(out):
        if arguments.finish:
            return _finish(arguments, out, access)
        return _freeze(arguments, out, access) if arguments.index_only else _work(arguments, out, access)


def _freeze(arguments: argparse.Namespace, out: Place, access: Access) -> int:
    from beit_dist.tokenizing.freeze import freeze

    header = freeze(arguments.images, out, arguments.seed or SETTINGS["seed"], access, sniff=arguments.sniff)
    print(f"{out}: {header.entries} images {'with' if header.labels else 'without'} labels are frozen")
    return 0


def _work(arguments: argparse.Namespace, out: Place, access: Access) -> int:
    if arguments.tokenizer is None:
        raise ConfigError("--tokenizer", None, "a tokenizer's file", "tools/train_tokenizer.py trains one.")
    from beit_dist.tokenizing.rejected import summary
    from beit_dist.tokenizing.run import Options, work

    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
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
        metrics_textfile=arguments.metrics_textfile,
        sniff=arguments.sniff,
        **(SETTINGS | given),
    )
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
        f"python {shlex.quote(sys.argv[0])} --out {shlex.quote(str(out))} --finish"
    )
    return 0


def _finish(arguments: argparse.Namespace, out: Place, access: Access) -> int:
    from beit_dist.tokenizing.finish import finish, finished
    from beit_dist.tokenizing.worker_index import worker_count

    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.tokenizer is not None:
        from beit_dist.tokenizing.tokenizer_file import tokenizer_at
        from beit_dist.visual_tokens.weights import tokenizer_digest

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
    from beit_dist.tokenizing.finish import read_rejected
    from beit_dist.tokenizing.rejected import summary

    total = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{out}: {manifest.samples} samples × {manifest.views} views in {len(manifest.shards)} shards "
        f"({total / 1e9:.2f} GB), {manifest.rejected} images rejected, digest {manifest.digest}"
    )
    for line in summary(read_rejected(out)):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--images",
        nargs="+",
        metavar="SRC",
        help="folders (with what is below) or tars, here or at URLs; {000..009} expands; a URL ending in .tar is "
        "a tar, any other a folder",
    )
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="folder of the data set, here or at a URL such as s3://bucket/x",
    )
    add(
        "--sniff",
        action="store_true",
        help="in folders at URLs, too, read the first bytes of files whose suffix is none of the usual ones: a "
        "request for each",
    )
    add("--tokenizer", metavar="FILE", help="the dVAE that makes the tokens (.safetensors), here or at a URL")

    bytes_ = parser.add_argument_group("what the shards hold (the same for all workers of a job)")
    add = bytes_.add_argument
    add(
        "--views",
        type=int,
        help="augmented versions of each image, used epoch by epoch (default 1)",
    )
    add("--image-size", type=int, help="side of the training image in pixels (default 224)")
    add("--patch-size", type=int, help="side of a patch; the tokenizer sees 8 px for each patch (default 16)")
    add(
        "--augment",
        choices=("random", "center"),
        help="BEiT's jitter, flip and random crop, or a plain centre crop "
        "for validation and pictures (default random)",
    )
    add("--shard-samples", type=int, help="images of a shard (default 4096: 631 MB)")
    add("--seed", type=int, help="of the order, crops, flips and jitter (default 0)")
    add("--batch", type=int, help="images of an encoder batch (default 64)")
    add(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="of the encoder's residual paths, which are most of its work. fp32, the default, rounds least; the "
        "others are faster on a device that has them, and few near-ties fall the other way",
    )

    work = parser.add_argument_group("how the work is split")
    add = work.add_argument
    add(
        "--index",
        type=int,
        help="this worker's number from 0; by default the task's id in the SLURM array, or Kubernetes' index",
    )
    add("--count", type=int, help="number of workers; by default $BEIT_WORKERS, else 1")
    add("--index-only", action="store_true", help="only freeze the list of images; needed before several workers")
    add("--finish", action="store_true", help="only check that all shards are there, and write the manifest")
    add("--no-finish", action="store_true", help="one worker alone would finish too; leave that out")
    add("--max-rejected", default="1%", metavar="N|P%", help="fail when more images cannot be used (default 1%%)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--decoders", type=int, help="decoding processes (default: one for each core, at most 16)")

    beside = parser.add_argument_group("beside the work")
    add = beside.add_argument
    add(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="serve Prometheus metrics of this worker; 0: any free port",
    )
    add(
        "--metrics-textfile",
        type=Path,
        metavar="FILE.prom",
        help="write them to a file of node_exporter's textfile folder, every 15 s; one file for each worker",
    )
    add_storage_argument(parser)
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
