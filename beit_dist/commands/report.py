"""``beit report``: one page for a browser about a run, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beit_dist.commands.options import (
    access_of,
    add_device,
    add_out,
    add_runs,
    add_samples,
    add_storage,
    add_their_tokenizer,
    at_least,
    check_out,
    runs_of,
)
from beit_dist.commands.parsing import CommandParser
from beit_dist.errors import ConfigError

SENTENCE = "Write one page for a browser about a run, or several side by side."

EXAMPLES = """\
  beit report runs/base --out base.html
  beit report runs/lr-1e-3 runs/lr-2e-3 --out compared.html
  beit report runs/classes runs/from-scratch --data labelled/val --out classes.html
  beit report s3://bucket/runs/base --ema --samples 12 --out base.html
"""

MORE = """\
The page first says what the run has reached beside its baselines. Then come curves, settings, and what its newest
checkpoint makes of held-out images: reconstructions of masked patches, confused classes, label maps,
self-attention. Data and time follow. A part that cannot be made (data that was moved, no checkpoint) is left out,
with a line that says why.

The page is one file, which needs no network and runs no script. You may name runs of different kinds. A run that
is still training is not disturbed. A probe's curve by layer is shown for runs with a probe.json in their folder:
beit probe RUN ... --json RUN/probe.json.
"""

_LARGE = 5_000_000
"""Bytes of a page from which on fewer samples are advised."""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("report", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to report")
    add_runs(what)
    what.add_argument(
        "--data",
        metavar="SRC",
        help="held-out images to look at: shards for a pre-training, labelled images for a fine-tuning (default: "
        "the run's own)",
    )
    add_their_tokenizer(what)
    add_samples(
        what,
        6,
        "images in the reconstructions; other pictures scale with it, and there are fewer for several runs",
    )
    what.add_argument(
        "--predicted",
        type=at_least("--predicted", 1),
        default=500,
        metavar="N",
        help="held-out images that a classification predicts, spread evenly (default: %(default)s)",
    )
    what.add_argument("--ema", action="store_true", help="the averaged weights, for runs that keep them")
    add_storage(what)
    how = parser.add_argument_group("how and where")
    add_out(how, "F.html", "the page", required=False)
    add_device(how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    asked = parser()
    arguments = asked.parse(argv)
    runs = runs_of(asked, arguments)
    if arguments.out is None:
        asked.error("expected --out F.html, the file of the page")
    out = Path(arguments.out)
    if out.is_dir():
        raise ConfigError(
            "--out", arguments.out, "a file, and not a folder", f"For instance {out / 'report.html'}."
        )
    check_out(out)
    from beit_dist.commands.pictures import kinds
    from beit_dist.engine.device import device_of
    from beit_dist.engine.durations import counted
    from beit_dist.reports.drawing import Wishes
    from beit_dist.reports.html.page import make_page, rendered
    from beit_dist.storage.durable import writing

    device = device_of(arguments.device)
    wishes = Wishes(arguments.data, arguments.tokenizer, arguments.samples, arguments.ema, device)
    page = make_page(runs, kinds(), wishes, access_of(arguments), predicted=arguments.predicted, progress=_say)
    content = rendered(page).encode("utf-8", "backslashreplace")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with writing(out) as file:
            file.write(content)
    except OSError as error:
        raise ConfigError("--out", arguments.out, f"a file that can be written ({error.strerror})") from None
    left_out = len(list(page.left_out))
    more = f"; {counted(left_out, 'part')} left out, as its end says why" if left_out else ""
    print(f"wrote {out}: {counted(len(runs), 'run')}, {len(content) / 1e6:.1f} MB{more}")
    if len(content) > _LARGE:
        print("the page is large: name fewer runs, or fewer --samples")
    return 0


def _say(what: str) -> None:
    print(f"looking at {what}", flush=True)
