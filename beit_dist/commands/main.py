"""``beit``: finds the command and hands the rest of the line to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import NoReturn

from beit_dist import __version__
from beit_dist.commands.parsing import spelling
from beit_dist.errors import exit_cleanly

COMMANDS = {
    "tokenizer": "beit_dist.commands.tokenizer",
    "shards": "beit_dist.commands.shards",
    "check": "beit_dist.commands.check",
    "inspect": "beit_dist.commands.inspect",
    "train": "beit_dist.commands.train",
    "finetune": "beit_dist.commands.finetune",
    "runs": "beit_dist.commands.runs",
    "pictures": "beit_dist.commands.pictures",
    "probe": "beit_dist.commands.probe",
    "embed": "beit_dist.commands.embed",
    "predict": "beit_dist.commands.predict",
    "similar": "beit_dist.commands.similar",
    "report": "beit_dist.commands.report",
    "export": "beit_dist.commands.export",
    "convert": "beit_dist.commands.convert",
    "plan": "beit_dist.commands.plan",
    "bench": "beit_dist.commands.bench",
}
"""The module of each command, in a newcomer's order; it has ``SENTENCE``, ``parser()`` and ``main(argv)``."""


def start() -> NoReturn:
    """Run ``beit`` and exit."""
    exit_cleanly(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is named first; its exit code.

    Raises:
        ConfigError: there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    launched = list(takewhile(lambda word: word.startswith("--local_rank"), words))  # deepspeed puts it first
    name, *rest = words[len(launched) :] or [""]
    if name in ("", "-h", "--help"):
        print(help_text(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"beit_dist {__version__}")
        return 0
    if name not in COMMANDS:
        from beit_dist.config.reading import entry_of  # here: it loads pydantic

        entry_of("command", name, COMMANDS)
    code: int = importlib.import_module(COMMANDS[name]).main([*launched, *rest])
    return code


def help_text() -> str:
    """Every command with its sentence."""
    beit = spelling("").alone.strip()
    width = max(map(len, COMMANDS))
    sentences = {name: importlib.import_module(module).SENTENCE for name, module in COMMANDS.items()}
    return "\n".join(
        (
            "Pre-train BEiT: from a folder of images to a model that has learnt from them.",
            f"\nusage: {beit} COMMAND ...\n\ncommands:",
            *(f"  {name:<{width}}  {sentence}" for name, sentence in sentences.items()),
            f"\n{beit} COMMAND --help describes a command, with examples.\n{beit} --version prints the version.",
        )
    )
