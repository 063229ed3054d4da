"""``beit convert``: DALL-E's published tokenizer as one of our files."""

from __future__ import annotations

from collections.abc import Sequence

from beit_dist.commands.options import add_out
from beit_dist.commands.parsing import CommandParser

SENTENCE = "Turn DALL-E's published encoder and decoder into a tokenizer file."

EXAMPLES = """\
  curl -fLO https://cdn.openai.com/dall-e/encoder.pkl
  curl -fLO https://cdn.openai.com/dall-e/decoder.pkl
  beit convert encoder.pkl decoder.pkl --out dalle.safetensors
  beit convert encoder.pkl --out dalle-encoder.safetensors
"""

MORE = """\
OpenAI's files are read as data: nothing in them is run, and a file that would run code is refused. The encoder
may also be mmpretrain's dalle_encoder.pth, or Hugging Face's FLAVA image codebook. Tokens, and so pre-training,
need only the encoder; pictures of tokens need the decoder too.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("convert", SENTENCE, EXAMPLES, MORE)
    given = parser.add_argument_group("what to convert")
    given.add_argument("encoder", metavar="encoder.pkl", help="or a state dict of it (.pth, .bin, .safetensors)")
    given.add_argument("decoder", metavar="decoder.pkl", nargs="?", help="without it: tokens only, no pictures")
    given.add_argument("--any-size", action="store_true", help="accept sizes other than the published ones")
    add_out(parser.add_argument_group("what to write"), "FILE", "the tokenizer to write (.safetensors)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    arguments = parser().parse(argv)
    from beit_dist.weights.dalle import convert
    from beit_dist.weights.tokenizer_files import check_writable

    check_writable(arguments.out)
    model = convert(arguments.encoder, arguments.decoder, arguments.out, arguments.any_size)
    parts = "encoder and decoder" if model.config.decoder_input else "encoder alone"
    print(f"wrote {arguments.out}: {parts}, {model.config.vocabulary} tokens, digest {model.digest[:16]}")
    return 0
