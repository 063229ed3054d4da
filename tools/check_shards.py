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

DESCRIPTION = """\
Read every shard of a data set and compare it with the manifest: sha256, tar headers, json, npy headers, keys and
their order in every view, the crc32 of every sample, tokens, padding. Prints what is wrong and where.
Exit code 0: whole; 1: something is wrong; 2: there is no data set to check.
"""

EXAMPLES = """\
examples:
  python tools/check_shards.py shards/
  python tools/check_shards.py shards/ --threads 16 --limit 1000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.threads < 1:
        raise ConfigError("--threads", arguments.threads, "1 or more")
    if arguments.limit < 1:
        raise ConfigError("--limit", arguments.limit, "1 or more")
    manifest = load_manifest(arguments.data)
    total = sum(shard.bytes for shard in manifest.shards)
    faults, lock = 0, threading.Lock()
    with tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=None) as bar:

        def advance(size: int) -> None:
            with lock:
                bar.update(size)

        for fault in verify(arguments.data, manifest, arguments.threads, advance):
            faults += 1
            if faults <= arguments.limit:
                tqdm.write(str(fault))
    if faults > arguments.limit:
        print(f"and {faults - arguments.limit} more (--limit lists more of them)")
    about = (
        f"{len(manifest.shards)} shards, {manifest.samples} samples × {manifest.views} views, {total / 1e9:.2f} GB"
    )
    if faults:
        print(f"{arguments.data}: {faults} faults in {about}")
        return 1
    print(f"{arguments.data}: whole: {about}, digest {manifest.digest}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DIR", help="folder that holds manifest.json")
    cores = min(16, len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=cores, help="shards read at once (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=100, help="faults to print (default: %(default)s)")
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
