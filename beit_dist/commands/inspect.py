"""``beit inspect``: what a data set holds, how its tokens are used, and some of its samples as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beit_dist.commands.options import (
    access_of,
    add_json,
    add_out,
    add_storage,
    at_least,
    write_json,
)
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

if TYPE_CHECKING:
    from beit_dist.reports.dataset import Inspection
    from beit_dist.reports.samples import Pixels
    from beit_dist.storage.access import Access

SENTENCE = "Show what a data set holds, in numbers and pictures."

FORMATS = (".png", ".jpg", ".pdf", ".svg")

EXAMPLES = """\
  beit inspect shards/
  beit inspect shards/ --out report.png --tokenizer dvae.safetensors
  beit inspect s3://shards/photos --samples 5000 --json facts.json
"""

MORE = """\
Shows counts and sizes, how many of the tokens are used and how evenly, baselines, labels, sources, and pictures.
It looks at a limited number of samples, from images spread evenly over all shards, so it is quick for any size and
at any URL. If the data set has no statistics.json, from which runs take their baselines, it writes one.

Exit code 0: all samples that were looked at are intact; 1: some are damaged; 2: there is no data set.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("inspect", SENTENCE, EXAMPLES, MORE)
    data = parser.add_argument_group("what to look at")
    parser.add_either(data, "data", "DIR", "folder that holds manifest.json, here or at a URL")
    data.add_argument(
        "--samples",
        type=at_least("--samples", 1),
        metavar="N",
        help="samples to look at (default: 1,000, or all of up to 1 GB whose tokens are not counted yet)",
    )
    add_storage(data)
    shown = parser.add_argument_group("what to show")
    add_out(shown, "FILE.png", "also draw a picture (.png, .jpg, .pdf or .svg)", required=False)
    shown.add_argument(
        "--pictures",
        type=at_least("--pictures", 1),
        default=40,
        metavar="N",
        help="samples in the picture, the views of an image side by side (default: %(default)s)",
    )
    shown.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="measure, and draw beside each sample, what this tokenizer makes of its tokens",
    )
    add_json(shown)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts and draw the picture; returns 1 if a sample was damaged."""
    arguments = parser().parse(argv)
    out = None if arguments.out is None else Path(arguments.out)
    if out and out.suffix.lower() not in FORMATS:
        raise ConfigError("--out", str(out), f"a file *{', *'.join(FORMATS)}")
    from tqdm import tqdm

    from beit_dist.reports.contact_sheet import draw_sheet
    from beit_dist.reports.dataset import inspect, lines, picked, samples_to_look_at
    from beit_dist.shards.manifest import load_manifest
    from beit_dist.storage.opening import open_place

    access = access_of(arguments)
    place = open_place(arguments.data, access)
    manifest = load_manifest(place)
    samples = arguments.samples or samples_to_look_at(place, manifest)
    pictures = arguments.pictures if out or arguments.tokenizer else 0
    with tqdm(total=len(picked(manifest, samples)), desc="looking", unit=" samples", disable=None) as bar:
        found = inspect(place, manifest, samples, pictures, bar.update)
    if arguments.tokenizer is not None and found.sheet:
        found.redrawn = _redrawn(arguments.tokenizer, access, found)
    silent, said = arguments.json == "-", found.keep_statistics(place)
    if not silent:
        print("\n".join([*lines(found.facts()), *said]), flush=True)
    if arguments.json:
        write_json(arguments.json, found.facts())
    if out:
        try:
            draw_sheet(found, out)
        except OSError as error:
            raise ConfigError("--out", str(out), f"a file that can be written ({error})") from None
        if not silent:
            print(f"wrote {out}")
    return 1 if found.damaged else 0


def _redrawn(tokenizer: str, access: Access, found: Inspection) -> list[Pixels]:
    from beit_dist.inference.painting import decode_tokens
    from beit_dist.inference.tokenizers import check_tokenizer
    from beit_dist.tokenizing.tokenizer_file import tokenizer_at
    from beit_dist.weights.tokenizer_files import load_tokenizer

    with tokenizer_at(tokenizer, access) as path:
        dvae = load_tokenizer(path)
    check_tokenizer(dvae, found.manifest.tokenizer)
    return list(decode_tokens(dvae, [sample.tokens for sample in found.sheet]))
