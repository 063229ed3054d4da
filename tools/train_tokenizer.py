"""Train a dVAE, the tokenizer that turns images into grids of visual tokens."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from types import FrameType

from beit_dist.config import TokenizerRecipe, load_recipe
from beit_dist.errors import exit_cleanly

DESCRIPTION = """\
Train a discrete VAE on images and write it as FILE.safetensors, with FILE.png beside it: held-out images over
their reconstructions from tokens. Look at that picture before sharding a data set with the tokenizer.

Nothing is written before the end, and then whole; an interrupted training leaves no file.
"""

EXAMPLES = """\
examples:
  python tools/train_tokenizer.py --images corpus/images --out tokenizer.safetensors --config configs/tokenizer_demo.yaml
  python tools/train_tokenizer.py --images photos.tar --out tokenizer.safetensors --config configs/tokenizer_small.yaml
  python tools/train_tokenizer.py --images 'train-{0000..0099}.tar' --out dvae.safetensors \\
      --config configs/tokenizer_dalle.yaml steps=200000 batch=256
"""  # noqa: E501


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", required=True, metavar="SRC", help="a folder of images, a tar, or tars as 'a-{000..009}.tar'"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write (.safetensors)")
    parser.add_argument("--config", metavar="YAML", help="recipe; configs/tokenizer_*.yaml (default: built in)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as steps=2000 or lr=1e-3"
    )
    options = parser.parse_args(argv)
    recipe = load_recipe(TokenizerRecipe, options.config, options.overrides)

    # Before PyTorch starts its threads. Theirs would spin while they wait, which on a CPU that others use too
    # made a training several times slower (measured: 80 steps in 127 s against 51 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # Imported here: --help and a wrong key should not wait for PyTorch.
    from beit_dist.engine.tokenizer_training import notice, train_tokenizer

    signal.signal(signal.SIGTERM, _interrupt)
    trained = train_tokenizer(options.images, options.out, recipe, options.device)
    quality = trained.quality
    print(f"wrote {trained.path} (digest {trained.digest[:16]}) and {trained.picture}")
    print(
        f"held-out PSNR {quality.psnr:.2f} dB, tokens in use {quality.used} of {quality.vocabulary}, "
        f"perplexity {quality.perplexity:.1f}"
    )
    if trained.skipped:
        notice(f"warning: {trained.skipped} steps were skipped for gradients that were not finite")
    if quality.collapsed:
        notice(
            f"warning: the codebook has COLLAPSED: perplexity {quality.perplexity:.1f} of {quality.vocabulary} "
            "tokens. Such tokens teach a model nothing. Lower kl_weight or temperature, train for more steps, "
            "or choose a smaller model.vocabulary"
        )
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    exit_cleanly(main)
