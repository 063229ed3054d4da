"""``beit similar``: the images nearest to some by their features, as a picture and a list."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.commands.many_images import RUN_HELP, add_batch
from beit_dist.commands.options import (
    access_of,
    add_device,
    add_images,
    add_json,
    add_out,
    add_storage,
    at_least,
    check_out,
    write_json,
)
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError, printable

if TYPE_CHECKING:
    from beit_dist.inference.embedding import Embedding
    from beit_dist.inference.model import LoadedModel
    from beit_dist.inference.similar import Answer, Similar
    from beit_dist.reports.similar_sheet import Shown
    from beit_dist.storage.access import Access

SENTENCE = "Show the images that are most similar to given ones."

EXAMPLES = """\
  beit similar runs/base cat.jpg --images photos/ --out similar.png
  beit similar runs/base cat.jpg car.jpg --embedded features.parquet --out similar.png
  beit similar beit-base-patch16-224/ cat.jpg --images photos/ --layer 8 \\
      --out similar.png --json -
"""

MORE = """\
The picture has a row for each query: the query, and beside it the images that are most similar to it, by the
cosine of their features, which is shown below each. Above 0.999 an image is marked as a duplicate: most likely it
is the same image in another file or size. To search more than once, name a file of beit embed instead of the
images.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("similar", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to look for, and with which model")
    what.add_argument("run", metavar="RUN", help=RUN_HELP)
    what.add_argument("queries", metavar="QUERY", nargs="+", help="image files, here or at URLs")
    what.add_argument("--ema", action="store_true", help="the averaged weights, if the run keeps them")
    what.add_argument(
        "--layer",
        type=at_least("--layer", 1),
        metavar="N",
        help="block whose output is compared, counted from 1 (default: for a pre-trained model the one at two "
        "thirds of the depth, for a fine-tuned one the last; or the only one in F)",
    )
    what.add_argument(
        "--token", choices=("mean", "class"), metavar="T", help="mean (of the patches, the default) or class"
    )
    where = parser.add_argument_group("where to look")
    add_images(where)
    where.add_argument("--embedded", metavar="F", help="a file of beit embed, instead of --images")
    add_storage(where)
    how = parser.add_argument_group("how and where")
    add_out(how, "F.png", "the picture")
    how.add_argument(
        "--top",
        type=at_least("--top", 1),
        default=8,
        metavar="K",
        help="images for each query (default: %(default)s)",
    )
    add_json(how)
    add_device(how)
    add_batch(how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Look for similar images; returns the exit code."""
    args = parser().parse(argv)
    _check(args)
    from beit_dist.engine.device import device_of
    from beit_dist.inference.loading import load
    from beit_dist.reports.similar_sheet import draw_similar

    access = access_of(args)
    model = load(args.run, ema=args.ema, device=device_of(args.device), access=access)
    silent = args.json == "-"
    answer, title = _answer(args, model, access, silent)
    name = f"{model.provenance.name}: {title} of {answer.compared:,} images"
    draw_similar(list(_rows(args.queries, answer, model, access)), args.out, name)
    if not silent:
        print("\n".join(_lines(args.queries, answer)))
        print(f"wrote {printable(args.out)}", flush=True)
    if args.json:
        write_json(
            args.json, [_facts(query, own) for query, own in zip(args.queries, answer.similar, strict=True)]
        )
    return 0


def _check(args: argparse.Namespace) -> None:
    from beit_dist.reports.similar_sheet import MOST_ROWS

    if bool(args.images) == bool(args.embedded):
        got = "both" if args.images else None
        raise ConfigError("--images", got, "either --images SRC or --embedded F, to look for similar images in")
    if Path(args.out).suffix.lower() != ".png":
        raise ConfigError("--out", args.out, "a file that ends in .png")
    check_out(args.out)
    if len(args.queries) > MOST_ROWS:
        raise ConfigError("QUERY", f"{len(args.queries)} images", f"at most {MOST_ROWS} for one picture")


def _answer(args: argparse.Namespace, model: LoadedModel, access: Access, silent: bool) -> tuple[Answer, str]:
    """What was found, and what the compared features are called."""
    from tqdm import tqdm

    from beit_dist.inference.collection import find_collection
    from beit_dist.inference.embedded import open_embedded
    from beit_dist.inference.similar import query_features, similar_in_file, similar_in_images

    if args.embedded is not None:
        embedded = open_embedded(args.embedded, access)
        work = _work(args, model, embedded.facts)
        queries = query_features(work, args.queries)
        return similar_in_file(work, queries, embedded, args.top, access), work.columns()[0].title
    images = find_collection(args.images, access, sniff=args.sniff)
    work = _work(args, model, {})
    queries = query_features(work, args.queries)
    with tqdm(total=len(images), desc="features", unit="image", disable=silent or None) as bar:
        answer = similar_in_images(
            work,
            queries,
            images,
            args.top,
            batch=args.batch,
            workers=args.workers,
            access=access,
            progress=bar.update,
        )
    return answer, work.columns()[0].title


def _work(args: argparse.Namespace, model: LoadedModel, facts: dict[str, Any]) -> Embedding:
    """The features that are compared: those asked for, or the only ones of a file, or the usual ones."""
    from beit_dist.inference.embedding import Embedding
    from beit_dist.probing.features import layers_of

    layers, token = facts.get("layers", []), facts.get("token", "mean")
    layer = args.layer or (layers[0] if len(layers) == 1 else model.default_layer)
    chosen = layers_of(model.prepare.config.depth, [layer], "--layer")
    return Embedding(model, chosen, args.token or ("mean" if token == "both" else token))


def _rows(queries: Sequence[str], answer: Answer, model: LoadedModel, access: Access) -> Iterator[list[Shown]]:
    import numpy as np

    from beit_dist.images.labelled.reading import read_image
    from beit_dist.reports.similar_sheet import Shown

    for query, similar in zip(queries, answer.similar, strict=True):
        row = [Shown(model.prepare.whole(query), query, "query")]
        for each in similar:
            pixels = None if each.file is None else np.asarray(read_image(each.file, access))
            row.append(Shown(pixels, each.row.name, _said(each), each.neighbour.is_duplicate))
        yield row


def _said(similar: Similar) -> str:
    words = [f"{similar.neighbour.cosine:.3f}", "duplicate" if similar.neighbour.is_duplicate else ""]
    return "  ".join(word for word in (*words, similar.row.label or "") if word)


def _lines(queries: Sequence[str], answer: Answer) -> Iterator[str]:
    for query, similar in zip(queries, answer.similar, strict=True):
        yield printable(query)
        for rank, each in enumerate(similar, 1):
            label = "" if each.row.label is None else f"  ({printable(each.row.label)})"
            mark = "  duplicate" if each.neighbour.is_duplicate else ""
            where = printable(f"{each.row.source}/{each.row.name}")
            yield f"{rank:>4}  {each.neighbour.cosine:.3f}  {where}{label}{mark}"
    if answer.unreadable:
        images = answer.compared + answer.unreadable
        yield f"{answer.unreadable:,} of {images:,} images cannot be read and were left out"


def _facts(query: str, similar: Sequence[Similar]) -> dict[str, Any]:
    return {
        "query": query,
        "similar": [
            {
                **each.row._asdict(),
                "cosine": round(each.neighbour.cosine, 6),
                "duplicate": each.neighbour.is_duplicate,
            }
            for each in similar
        ],
    }
