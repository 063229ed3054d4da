"""Generate a labelled corpus of pictures: class folders of images and segmentation label maps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from beit_dist.errors import exit_cleanly
from corpus.writer import CLASSES, write_corpus

DESCRIPTION = """\
Generate a labelled corpus of pictures: small landscapes, drawn from a seed, in ten classes by what stands in
front. Nothing is downloaded.

  DIR/images/<class>/<number>.jpg    the pictures; give DIR/images to train_tokenizer.py and shard_tokens.py
  DIR/labels/<class>/<number>.png    segmentation label maps of the same names (palette images of label numbers)
  DIR/classes.json                   names of classes and labels, size and seed; written last
"""

EXAMPLES = """\
examples:
  python tools/make_corpus.py --out corpus --images 2000
  python tools/make_corpus.py --out corpus --images 50000 --size 256 --seed 7
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; new, empty or unfinished")
    parser.add_argument("--images", required=True, type=int, metavar="N", help="number of pictures")
    parser.add_argument("--size", type=int, default=128, metavar="S", help="side in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default: 0)")
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="processes (default: one per CPU)")
    options = parser.parse_args(argv)
    made = write_corpus(options.out, options.images, options.size, options.seed, options.workers)
    verb = "wrote" if made else "already there:"
    print(f"{verb} {options.images} images in {len(CLASSES)} classes under {Path(options.out) / 'images'}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
