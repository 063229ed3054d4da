"""``beit export``: the weights of a run for others."""

from __future__ import annotations

from collections.abc import Sequence

from beit_dist.commands.options import access_of, add_out, add_storage
from beit_dist.commands.parsing import CommandParser
from beit_dist.weights.forms import FORMS, PRECISIONS

SENTENCE = "Write the weights of a checkpoint for other programs."

EXAMPLES = """\
  beit export runs/base --to safetensors --out exported/
  beit export runs/base --to safetensors --out base.safetensors --precision bf16 --ema
  beit export runs/base --to hf --out exported-hf/
  beit export runs/base/checkpoints/step-00012000.a0001 --to timm --out at-12000/
"""

MORE = """\
  safetensors  one file, with the model's own parameter names; needs memory for one tensor
  hf           a folder that BeitForMaskedImageModeling.from_pretrained reads, with the image processor; for
               a classification, BeitForImageClassification, with the names of its classes
  timm         a folder for timm's Beit: for pre-training, without classifier, mask token or head over tokens;
               for a classification, with its head and the names of its classes
  unilm        model.pth, which the original fine-tuning scripts read
Segmentations are exported as safetensors only.

Reading the result needs neither DeepSpeed nor beit_dist. Every byte of the checkpoint is verified first.
Needs no GPU; may be called while the run is training.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("export", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to export")
    parser.add_either(what, "run", "RUN_OR_STEP", "run folder, or one of its step folders; or its URL")
    what.add_argument("--ema", action="store_true", help="the averaged weights, if the run keeps them")
    add_storage(what)
    form = parser.add_argument_group("what to write")
    form.add_argument("--to", choices=["safetensors", *FORMS], required=True, help="names and format of weights")
    add_out(form, "DIR_OR_FILE", "folder; or, for safetensors, a .safetensors file")
    form.add_argument(
        "--precision", "--dtype", choices=PRECISIONS, default="fp32", help="default: %(default)s, exact"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code."""
    arguments = parser().parse(argv)
    from tqdm import tqdm

    from beit_dist.weights.ecosystem import export_elsewhere
    from beit_dist.weights.export import export_weights
    from beit_dist.weights.origin import KINDS
    from beit_dist.weights.stored import open_weights

    stored = open_weights(arguments.run, ema=arguments.ema, access=access_of(arguments), kinds=KINDS)
    if arguments.to in FORMS:
        exported = export_elsewhere(stored, arguments.out, arguments.to, arguments.precision)
    else:
        with tqdm(total=stored.values, desc="exporting", unit="value", unit_scale=True, disable=None) as bar:

            def advance(values: int) -> None:
                bar.update(values)

            exported = export_weights(stored, arguments.out, arguments.precision, advance)
    kind = "averaged weights" if arguments.ema else "weights"
    print(
        f"wrote {exported.path}: {kind} of {stored.saved.folder.name}, {exported.tensors} tensors in "
        f"{arguments.precision}, {exported.bytes / 1e6:.1f} MB"
        + (f"; for {exported.reader}" if exported.reader else "")
    )
    return 0
