"""The tokenizer that a pre-training learnt to predict the tokens of, found by its digest."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.errors import TokenizerError
from beit_dist.models.dvae import DVAE
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import is_url
from beit_dist.weights.tokenizer_files import digests_of, load_tokenizer

TOKENIZER = "tokenizer.safetensors"
"""Name under which a tokenizer is looked for."""


def check_tokenizer(dvae: DVAE, digest: str) -> None:
    """Refuse a tokenizer that did not make the tokens, or cannot draw.

    Args:
        digest: of the one that made them.

    Raises:
        TokenizerError: it is another one, or has no decoder.
    """
    dvae.whole_decoder()
    if digest not in digests_of(dvae):
        raise TokenizerError(
            f"tokenizer: got digest {dvae.digest[:12]}, expected {digest[:12]}, the one that made the shards. "
            "Name that file with --tokenizer."
        )


def find_tokenizer(
    named: str | PathLike[str] | None, config: PretrainingConfig, digest: str, device: torch.device
) -> DVAE | None:
    """The tokenizer that made the tokens: the one that is named, the recipe's, or one that lies beside the data.

    None: nothing is named, and no file with its digest is found.

    Args:
        named: by the user.
        config: the run's recipe.
        digest: of the tokenizer.
        device: where it shall be.

    Raises:
        TokenizerError: the one that is named is damaged, or another one.
    """
    if named is not None:
        dvae = load_tokenizer(Path(named), device)
        check_tokenizer(dvae, digest)
        return dvae
    for path in _places_to_look(config):
        if path.is_file():
            dvae = load_tokenizer(path, device)
            if dvae.config.decoder_input and digest in digests_of(dvae):
                return dvae
    return None


def _places_to_look(config: PretrainingConfig) -> list[Path]:
    found = [] if config.tokenizer is None else [Path(config.tokenizer)]
    if config.data is not None and not is_url(config.data):
        data = open_place(config.data).path
        found += [data / TOKENIZER, data.parent / TOKENIZER]
    return found
