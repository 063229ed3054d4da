"""Draw what a run has learnt: its loss curve, and masked patches painted from the tokens it predicts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from beit_dist.data.masking import MaskGenerator
from beit_dist.data.shards import load_manifest
from beit_dist.data.storage import open_reader
from beit_dist.engine.checkpoint.weights import load_weights
from beit_dist.engine.run_folder import METRICS
from beit_dist.errors import ConfigError, exit_cleanly
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.curves import draw_curves, read_history
from beit_dist.reports.panels import check_fit, draw_panel, read_samples, reconstruct
from beit_dist.visual_tokens.weights import load_tokenizer

DESCRIPTION = """\
Draw what a run has learnt.

  loss.png    loss and accuracy by step, the loss of guessing, and where the run was resumed
  panel.png   a few images of the data set: the image; what the model sees of it; its true tokens, decoded by the
              tokenizer; and the same with those of masked patches as the model predicts them

Needs no GPU, and may be called while the run is training: the newest whole checkpoint is taken.
"""

EXAMPLES = """\
examples:
  python tools/draw_pictures.py runs/base --tokenizer dvae.safetensors
  python tools/draw_pictures.py runs/base --tokenizer dvae.safetensors --samples 8 --out pictures/
  python tools/draw_pictures.py runs/base/checkpoints/step-00012000.a0001 --tokenizer dvae.safetensors --out at/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pictures; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.samples < 1:
        raise ConfigError("--samples", arguments.samples, "1 or more")
    weights, config, facts = load_weights(arguments.run)
    if arguments.data is None and config.data is None:
        raise ConfigError("--data", None, "the folder of the shards", "The run's recipe does not name any.")
    data, access = arguments.data or config.data, config.storage.access
    run = arguments.run.parent.parent if (arguments.run / "manifest.json").is_file() else arguments.run
    out = arguments.out or run / "pictures"

    sizes = config.model
    title = f"Pre-training of BEiT with {sizes.depth} blocks of width {sizes.width}"
    draw_curves(read_history(run / METRICS), sizes.vocabulary, out / "loss.png", title)
    print(f"wrote {out / 'loss.png'}", flush=True)

    manifest, dvae = load_manifest(data, access), load_tokenizer(arguments.tokenizer)
    model = MaskedImageModel(sizes)
    model.load_state_dict(weights)
    check_fit(model, dvae, manifest)
    masks = MaskGenerator(sizes.grid, config.masking, config.seed)
    samples = read_samples(open_reader(data, access), manifest, arguments.samples)
    columns = reconstruct(model, dvae, samples, masks)
    draw_panel(columns, out / "panel.png", f"Masked patches painted from predicted tokens, step {facts['step']}")
    print(f"wrote {out / 'panel.png'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or one of its step folders")
    parser.add_argument("--data", metavar="DIR_OR_URL", help="shards to take images from (default: the run's)")
    parser.add_argument("--tokenizer", metavar="FILE", required=True, help="tokenizer that made the shards")
    parser.add_argument("--samples", type=int, default=6, help="images of the panel (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: RUN/pictures)")
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
