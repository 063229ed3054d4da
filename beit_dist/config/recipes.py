"""Recipes and DeepSpeed files that come with the package, found by name.

In a checkout ``beit_dist/recipes`` is a link to ``configs/``; in an installed package it is a folder of its own.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from beit_dist.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "recipes"

KINDS = {
    "pretraining": ("--config", "*.yaml", "a recipe"),
    "tokenizer": ("--config", "tokenizer_*.yaml", "a recipe"),
    "finetuning": ("--config", "finetune_*.yaml", "a recipe"),
    "deepspeed": ("--ds_config", "deepspeed/*.json", "a DeepSpeed file"),
}
"""Of each kind: the option that names one, the files that ship, and what one is called."""


def shipped(kind: str) -> dict[str, Path]:
    """The files of a kind of ``KINDS``, by name."""
    files = {path.stem: path for path in sorted(FOLDER.glob(KINDS[kind][1]))}
    others = {**shipped("tokenizer"), **shipped("finetuning")} if kind == "pretraining" else {}
    return {name: path for name, path in files.items() if name not in others}


def named(kind: str, given: str) -> Path:
    """The file that a user means: what has a slash or a suffix is a path, anything else a name.

    Raises:
        ConfigError: no shipped file has the name, or there is nothing at the path.
    """
    path, files = Path(given), shipped(kind)
    if "/" not in given and not path.suffix and given in files:
        return files[given]
    if ("/" in given or path.suffix) and path.exists():
        return path
    option, _, one = KINDS[kind]
    close = difflib.get_close_matches(path.stem, files, n=1, cutoff=0.5)
    ways = [f"Did you mean {close[0]}?"] if close else []
    if path.is_file():
        ways.append(f"For the file in this folder write ./{given}.")
    raise ConfigError(
        option, given, f"the path of a file, or the name of {one}: {', '.join(files)}", " ".join(ways)
    )
