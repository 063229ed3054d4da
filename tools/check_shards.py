"""Verify every byte of a data set against its manifest."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence

from tqdm import tqdm

from beit_dist.data.shards import load_manifest
from beit_dist.data.verification import verify
from beit_dist.errors import ConfigError, exit_cleanly
from beit_dist.storage.opening import open_place
from beit_dist.storage_option import access_of, add_storage_argument

DESCRIPTION = """\
Read every shard of a data set and compare it with the manifest: sha256, tar headers, json, npy headers, keys and
their order in every view, the crc32 of every sample, tokens, padding. Prints what is wrong and where.
Exit code 0: whole; 1: something is wrong; 2: there is no data set to check.
"""

EXAMPLES = """\
examples:
  python tools/check_shards.py shards/
  python tools/check_shards.py s3://shards/photos --threads 32
  python tools/check_shards.py shards/ --threads 16 --limit 1000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError("--threads", arguments.threads, "1 or more")
    if arguments.limit < 1:
        raise ConfigError("--limit", arguments.limit, "1 or more")
    access = access_of(arguments)
    place = open_place(arguments.data, access)
    manifest = load_manifest(place)
    cores = min(16, len(os.sched_getaffinity(0)))
    threads = arguments.threads or (cores if place.is_local else 16)
    total = sum(shard.bytes for shard in manifest.shards)
    faults, lock = 0, threading.Lock()
    with tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=None) as bar:

        def advance(size: int) -> None:
            with lock:
                bar.update(size)

        for fault in verify(place, manifest, threads, advance):
            faults += 1
            if faults <= arguments.limit:
                tqdm.write(str(fault))
    if faults > arguments.limit:
        print(f"and {faults - arguments.limit} more (--limit lists more of them)")
    about = (
        f"{len(manifest.shards)} shards, {manifest.samples} samples × {manifest.views} views, {total / 1e9:.2f} GB"
    )
    if faults:
        print(f"{place}: {faults} faults in {about}")
        return 1
    print(f"{place}: whole: {about}, digest {manifest.digest}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DIR", help="folder that holds manifest.json, here or at a URL")
    parser.add_argument(
        "--threads",
        type=int,
        help="shards read at once (default: one for each core; 16 for a store, which is far)",
    )
    parser.add_argument("--limit", type=int, default=100, help="faults to print (default: %(default)s)")
    add_storage_argument(parser)
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
