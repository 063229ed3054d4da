"""``beit check``: verify every byte of a data set against its manifest."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from beit_dist.commands.options import access_of, add_storage, at_least
from beit_dist.commands.parsing import CommandParser

SENTENCE = "Verify every byte of a data set against its manifest."

EXAMPLES = """\
  beit check shards/
  beit check s3://shards/photos --threads 32
  beit check shards/ --threads 16 --limit 1000
"""

MORE = """\
Every shard is read and compared with the manifest: sha256, tar headers, json, npy headers, keys and
their order in every view, the crc32 of every sample, tokens, padding. Held-out images are checked too:
none of them may be trained on. Each fault is printed with its place. A statistics.json that is
missing or wrong is reported, but is not a fault of the data set.

Exit code 0: the data set is intact; 1: something is wrong; 2: there is no data set to check.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("check", SENTENCE, EXAMPLES, MORE)
    data = parser.add_argument_group("what to check")
    parser.add_either(data, "data", "DIR", "folder that holds manifest.json, here or at a URL")
    add_storage(data)
    how = parser.add_argument_group("how to check")
    how.add_argument(
        "--threads",
        type=at_least("--threads", 1),
        metavar="N",
        help="shards read at once (default: one for each core; 16 for a store)",
    )
    how.add_argument(
        "--limit",
        type=at_least("--limit", 1),
        default=100,
        metavar="N",
        help="faults to print (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set; returns the exit code."""
    arguments = parser().parse(argv)
    from tqdm import tqdm

    from beit_dist.shards.manifest import load_held_out, load_manifest
    from beit_dist.shards.verification import verify_with_held_out
    from beit_dist.storage.opening import open_place

    place = open_place(arguments.data, access_of(arguments))
    manifest, held_out = load_manifest(place), load_held_out(place)
    cores = min(16, len(os.sched_getaffinity(0)))
    threads = arguments.threads or (cores if place.is_local else 16)
    shards = manifest.shards + (held_out.shards if held_out else ())
    total = sum(shard.bytes for shard in shards)
    faults, notes, lock = 0, list[str](), threading.Lock()
    with tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=None) as bar:

        def advance(size: int) -> None:
            with lock:
                bar.update(size)

        for fault in verify_with_held_out(place, manifest, held_out, threads, advance, notes):
            faults += 1
            if faults <= arguments.limit:
                tqdm.write(str(fault))
    if faults > arguments.limit:
        print(f"and {faults - arguments.limit} more (--limit lists more of them)")
    kept = f" and {held_out.samples} held out" if held_out else ""
    about = (
        f"{len(shards)} shards, {manifest.samples} samples × {manifest.views} views{kept}, {total / 1e9:.2f} GB"
    )
    for note in notes:
        print(note)
    if faults:
        print(f"{place}: {faults} faults in {about}")
        return 1
    print(f"{place}: whole: {about}, digest {manifest.digest}")
    return 0
