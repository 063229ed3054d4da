"""Write the weights of a run for others: needs neither DeepSpeed nor this package to be read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from beit_dist.engine.checkpoint.weights import open_weights
from beit_dist.engine.ecosystem import FORMS, export_elsewhere
from beit_dist.engine.export import DTYPES, export_weights
from beit_dist.errors import exit_cleanly
from beit_dist.storage_option import access_of, add_storage_argument

DESCRIPTION = """\
Write the weights of a checkpoint for other programs. Every byte of it is verified first. Needs no GPU; may be
called while the run is training.

  safetensors  one file, parameters under the names they have in the model; memory for one tensor
  hf           a folder that BeitForMaskedImageModeling.from_pretrained reads, with the image processor
  timm         a folder of timm's Beit without a classifier; no mask token, no head over tokens
  unilm        model.pth, which the original fine-tuning scripts read
"""

EXAMPLES = """\
examples:
  python tools/export_checkpoint.py runs/base --to safetensors --out exported/
  python tools/export_checkpoint.py runs/base --to safetensors --out base.safetensors --dtype bf16 --ema
  python tools/export_checkpoint.py runs/base --to hf --out exported-hf/
  python tools/export_checkpoint.py runs/base/checkpoints/step-00012000.a0001 --to safetensors --out at-12000/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code."""
    arguments = _parser().parse_args(argv)
    stored = open_weights(arguments.run, ema=arguments.ema, access=access_of(arguments))
    if arguments.to in FORMS:
        exported = export_elsewhere(stored, arguments.out, arguments.to, arguments.dtype)
    else:
        with tqdm(total=stored.values, desc="exporting", unit="value", unit_scale=True, disable=None) as bar:
            exported = export_weights(stored, arguments.out, arguments.dtype, bar.update)
    kind = "averaged weights" if arguments.ema else "weights"
    print(
        f"wrote {exported.path}: {kind} of {stored.saved.folder.name}, {exported.tensors} tensors in "
        f"{arguments.dtype}, {exported.bytes / 1e6:.1f} MB"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_OR_STEP", help="run folder, or one of its step folders; or its URL")
    parser.add_argument(
        "--to", choices=["safetensors", *FORMS], required=True, help="names and form of the weights"
    )
    parser.add_argument(
        "--out", metavar="DIR_OR_FILE", required=True, help="folder; or, for safetensors, a .safetensors file"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="default: %(default)s, exact")
    parser.add_argument("--ema", action="store_true", help="the averaged weights, if the run keeps them")
    add_storage_argument(parser)
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
