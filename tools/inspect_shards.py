"""Show a data set to a person: what it holds, how its tokens are used, and some of its samples as pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from beit_dist.data.shards import Manifest, load_manifest
from beit_dist.errors import ConfigError, exit_cleanly
from beit_dist.reports.contact_sheet import draw_sheet
from beit_dist.reports.dataset import Inspection, Pixels, inspect, lines
from beit_dist.reports.panels import check_tokenizer, decode_tokens
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage_option import access_of, add_storage_argument
from beit_dist.tokenizing.tokenizer_file import tokenizer_at
from beit_dist.visual_tokens.weights import load_tokenizer

DESCRIPTION = """\
Show a data set: counts and sizes, how many of the tokens are used and how evenly, labels, sources, and pictures.
Looks at a bounded number of samples, evenly spread over all shards, so it is quick for any size and at any URL.
"""

FORMATS = (".png", ".jpg", ".pdf", ".svg")

EXAMPLES = """\
examples:
  python tools/inspect_shards.py shards/
  python tools/inspect_shards.py shards/ --out report.png --tokenizer dvae.safetensors
  python tools/inspect_shards.py s3://shards/photos --samples 5000 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts and draw the picture; returns 1 if a sample was damaged."""
    arguments = _parser().parse_args(argv)
    for name, least in (("samples", 1), ("pictures", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name}", getattr(arguments, name), f"{least} or more")
    if arguments.out and arguments.out.suffix.lower() not in FORMATS:
        raise ConfigError("--out", str(arguments.out), f"a file *{', *'.join(FORMATS)}")
    access = access_of(arguments)
    place = open_place(arguments.data, access)
    manifest = load_manifest(place)
    total = min(arguments.samples, manifest.samples * manifest.views)
    pictures = arguments.pictures if arguments.out else 0
    with tqdm(total=total, desc="looking", unit=" samples", disable=None) as bar:
        found = inspect(place, manifest, arguments.samples, pictures, bar.update)
    facts = found.facts()
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(lines(facts)), flush=True)
    if arguments.out:
        redrawn = _redrawn(arguments.tokenizer, access, manifest, found)
        try:
            draw_sheet(found, redrawn, arguments.out)
        except OSError as error:
            raise ConfigError("--out", str(arguments.out), f"a file that can be written ({error})") from None
        if not arguments.json:
            print(f"wrote {arguments.out}")
    return 1 if found.damaged else 0


def _redrawn(tokenizer: str | None, access: Access, manifest: Manifest, found: Inspection) -> list[Pixels] | None:
    if tokenizer is None:
        return None
    with tokenizer_at(tokenizer, access) as path:
        dvae = load_tokenizer(path)
    check_tokenizer(dvae, manifest)
    return list(decode_tokens(dvae, [sample.tokens for sample in found.sheet]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", metavar="DIR", help="folder that holds manifest.json, here or at a URL")
    add("--samples", type=int, default=1000, metavar="N", help="samples to look at (default: %(default)s)")
    add("--out", type=Path, metavar="FILE.png", help="also draw a picture")
    add("--pictures", type=int, default=40, metavar="N", help="samples in the picture (default: %(default)s)")
    add("--tokenizer", metavar="FILE", help="draw beside each sample what this tokenizer makes of its tokens")
    add("--json", action="store_true", help="print the facts as JSON")
    add_storage_argument(parser)
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
