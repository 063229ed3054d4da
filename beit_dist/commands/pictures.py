"""``beit pictures``: a run's curves beside their baselines, and masked patches painted from what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beit_dist.commands.options import (
    access_of,
    add_device,
    add_out,
    add_runs,
    add_samples,
    add_storage,
    add_their_tokenizer,
    runs_of,
)
from beit_dist.commands.parsing import CommandParser

if TYPE_CHECKING:
    from beit_dist.reports.drawing import Kind

SENTENCE = "Draw what a run has learnt."

EXAMPLES = """\
  beit pictures runs/base
  beit pictures runs/base --tokenizer dvae.safetensors --samples 12 --ema \\
      --out pictures/
  beit pictures runs/base/checkpoints/step-00012000.a0001 --out at-12000/
  beit pictures runs/lr-1e-3 runs/lr-2e-3 --out compared/
"""

MORE = """\
  loss.png    loss and accuracy by step, in training and on held-out images, beside their baselines; learning rate,
              gradient norm, and where the run was resumed. For a tokenizer's run, its own numbers
  panel.png   a few held-out images: the image; what the model sees of it; its true tokens, decoded by the
              tokenizer; and the same with the tokens that the model predicts for the masked patches. With
              model.target=pixels: the image with the masked patches as the model paints them

Several runs are drawn in one loss.png, and no panel is drawn. Needs no GPU, and may be called while a run is
training: it uses the newest complete checkpoint.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("pictures", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to draw")
    add_runs(what)
    what.add_argument(
        "--data",
        metavar="DIR_OR_URL",
        help="shards to take images from (default: the run's held-out images or, without any, its data)",
    )
    add_their_tokenizer(what)
    add_samples(what, 6, "images of the panel")
    what.add_argument("--ema", action="store_true", help="paint with the averaged weights, if the run keeps them")
    add_storage(what)
    how = parser.add_argument_group("how and where")
    add_out(how, "DIR", "folder to write to (default: RUN/pictures; needed for several runs)", required=False)
    add_device(how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures; returns the exit code."""
    asked = parser()
    arguments = asked.parse(argv)
    runs = runs_of(asked, arguments)
    from beit_dist.engine.device import device_of
    from beit_dist.reports.drawing import Wishes, compare_runs, draw_run

    out, access = None if arguments.out is None else Path(arguments.out), access_of(arguments)
    if len(runs) > 1:
        print(compare_runs(runs, kinds(), out, access))
        return 0
    device = device_of(arguments.device)
    wishes = Wishes(arguments.data, arguments.tokenizer, arguments.samples, arguments.ema, device)
    for line in draw_run(runs[0], kinds(), wishes, out, access):
        print(line, flush=True)
    return 0


def kinds() -> Mapping[str, Kind]:
    """What is known of each kind of run: a task is not needed to draw what it has left."""
    from beit_dist.config.finetuning import FinetuningConfig
    from beit_dist.config.pretraining import PretrainingConfig
    from beit_dist.config.tokenizer import TokenizerConfig
    from beit_dist.models.heads.targets import head_of
    from beit_dist.reports.drawing import Kind
    from beit_dist.tasks.finetuning.numbers import measured_of, numbers_of
    from beit_dist.tasks.pretraining.probe import baselines_of, probed
    from beit_dist.tasks.tokenizer.numbers import KNOWN, MEASURED, NUMBERS

    finetuning = Kind(
        schema=FinetuningConfig,
        numbers=numbers_of,
        measured=measured_of,
        title=lambda recipe: (
            f"fine-tuning of BEiT, {recipe.model.depth} blocks of width {recipe.model.width}, for {recipe.task}"
        ),
    )
    return {
        "pretraining": Kind(
            schema=PretrainingConfig,
            numbers=lambda recipe: head_of(recipe.model).numbers,
            measured=lambda recipe: (*head_of(recipe.model).numbers, *probed(recipe)),
            title=lambda recipe: (
                f"pre-training of BEiT, {recipe.model.depth} blocks of width {recipe.model.width}"
            ),
            baselines=baselines_of,
        ),
        "tokenizer": Kind(
            schema=TokenizerConfig,
            numbers=lambda recipe: (*NUMBERS, *KNOWN),
            measured=lambda recipe: MEASURED,
            title=lambda recipe: f"training of a tokenizer of {recipe.model.vocabulary:,} tokens",
        ),
        "classification": finetuning,
        "segmentation": finetuning,
    }
