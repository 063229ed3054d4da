"""A parser whose help starts with one sentence and examples, in the words with which the command was started."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Spelling(NamedTuple):
    """How the user starts a command."""

    alone: str
    """``beit train``, or ``python tools/x.py``."""
    launched: str
    """What a launcher such as ``deepspeed`` is given: ``--module beit_dist train``, or ``tools/x.py``."""


def spelling(command: str) -> Spelling:
    """How this process was started, as somebody would type it to start ``command`` once more."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None and Path(sys.argv[0]).suffix == ".py":
        return Spelling(f"python {sys.argv[0]}", sys.argv[0])
    module = "" if spec is None else spec.name.removesuffix(".__main__")
    if module.partition(".")[0] != "beit_dist":
        return Spelling(f"beit {command}", f"--module beit_dist {command}")
    words = f"{module} {command}" if module == "beit_dist" else module
    return Spelling(f"python -m {words}", f"--module {words}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fits paragraphs to the terminal's width, and leaves those with an indented line, such as examples, alone."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (
            paragraph if "\n " in f"\n{paragraph}" else textwrap.fill(paragraph, width)
            for paragraph in text.strip("\n").split("\n\n")
        )
        return "\n\n".join(paragraphs)


class CommandParser(argparse.ArgumentParser):
    """The parser of one command.

    Args:
        command: its name, as in ``beit NAME``.
        sentence: what it does.
        examples: command lines with ``beit NAME``, or with ``--module beit_dist NAME`` behind a launcher; both are
            shown as the user spells them.
        more: what else there is to know, for the end of the help.
    """

    def __init__(self, command: str, sentence: str, examples: str, more: str = "") -> None:
        self.spelling = spelling(command)
        super().__init__(prog=self.spelling.alone, epilog=more, formatter_class=_Formatter)
        self.sentence = sentence
        spelt = examples.replace(f"--module beit_dist {command}", self.spelling.launched)
        self.examples = "examples:\n" + spelt.replace(f"beit {command}", self.spelling.alone).rstrip()
        self._either: dict[str, str] = {}

    def add_either(self, group: argparse._ArgumentGroup, name: str, metavar: str, help: str, **kind: type) -> None:
        """An argument that is given by its place or as ``--name``, once."""
        group.add_argument(f"{name}_by_place", metavar=metavar, nargs="?", help=help, **kind)  # type: ignore[arg-type]
        group.add_argument(f"--{name}", metavar=metavar, help=f"the same as {metavar}", **kind)  # type: ignore[arg-type]
        self._either[name] = metavar

    def parse(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """The command line, options and arguments in any order; what may be given in two ways is given in one."""
        parsed = self.parse_intermixed_args(words)
        for name, metavar in self._either.items():
            given = [getattr(parsed, name), vars(parsed).pop(f"{name}_by_place")]
            values = [value for value in given if value is not None]
            if len(values) != 1:
                self.error(f"expected {metavar} or --{name} {metavar}{', not both' if values else ''}")
            setattr(parsed, name, values[0])
        return parsed

    def format_help(self) -> str:
        """The sentence, examples, usage, options by group, and then the rest."""
        formatter = self._get_formatter()
        formatter.add_text(self.sentence)
        formatter.add_text(self.examples)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        for group in (*self._action_groups[2:], *self._action_groups[:2]):  # the first two are argparse's own
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()
