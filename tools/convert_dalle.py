"""Turn DALL-E's published encoder and decoder into a tokenizer file, without running anything that is in them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from beit_dist.errors import exit_cleanly
from beit_dist.visual_tokens.dalle import convert
from beit_dist.visual_tokens.weights import check_writable

DESCRIPTION = """\
Read OpenAI's encoder.pkl and decoder.pkl as data and write them as one tokenizer for tools/shard_tokens.py. A file
that would run code is refused. The encoder may also be mmpretrain's dalle_encoder.pth, or Hugging Face's FLAVA
image codebook. Tokens, and so pre-training, need the encoder only; pictures of tokens need the decoder too.
"""

EXAMPLES = """\
examples:
  curl -fLO https://cdn.openai.com/dall-e/encoder.pkl
  curl -fLO https://cdn.openai.com/dall-e/decoder.pkl
  python tools/convert_dalle.py encoder.pkl decoder.pkl --out dalle.safetensors
  python tools/convert_dalle.py encoder.pkl --out dalle-encoder.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", metavar="encoder.pkl", help="or a state dict of it (.pth, .bin, .safetensors)")
    parser.add_argument("decoder", metavar="decoder.pkl", nargs="?", help="left out: no pictures, tokens only")
    parser.add_argument("--out", required=True, metavar="FILE", help="the tokenizer to write (.safetensors)")
    parser.add_argument("--any-size", action="store_true", help="do not insist on the published sizes")
    arguments = parser.parse_args(argv)
    check_writable(arguments.out)
    model = convert(arguments.encoder, arguments.decoder, arguments.out, arguments.any_size)
    parts = "encoder and decoder" if model.config.decoder_input else "encoder alone"
    print(f"wrote {arguments.out}: {parts}, {model.config.vocabulary} tokens, digest {model.digest[:16]}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
