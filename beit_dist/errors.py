"""The exceptions a user can act on, and how a command ends when one is raised."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right. Printed without a traceback; the process exits with ``exit_code``.

    Exit code 2 tells schedulers that no retry helps; 1 that one might.
    """

    exit_code = 2


class ConfigError(UserError):
    """A setting is wrong.

    Args:
        field: dotted name of the setting, as the user would write it (``model.patch_size``).
        got: the offending value.
        expected: what would have been accepted.
        way_out: what to change, if more can be said than ``expected`` does.
    """

    def __init__(self, field: str, got: object, expected: str, way_out: str = "") -> None:
        self.field, self.got, self.expected, self.way_out = field, got, expected, way_out
        text = f"{field}: got {got!r}, expected {expected}"
        super().__init__(f"{text}. {way_out}" if way_out else text)


class DataError(UserError):
    """Images, shards or a manifest are missing, foreign or damaged."""


class SampleError(DataError):
    """A sample could not be read whole while running; another attempt may succeed."""

    exit_code = 1


class TokenizerError(UserError):
    """A tokenizer file is missing, damaged, or not the one that was asked for."""


class WeightsError(UserError):
    """A file of weights is missing, damaged, not of this model, or would run code if it were loaded."""


class CheckpointError(UserError):
    """A checkpoint cannot be used, or the run in the folder is another one."""


class PreflightError(UserError):
    """A host cannot do what the run asks of it; found before anything was allocated."""


class TrainingError(UserError):
    """The run cannot go on; another start may do better.

    Args:
        message: for a person.
        details: more than a message should hold, for the marker ``FAILED``.
    """

    exit_code = 1

    def __init__(self, message: str, details: object = None) -> None:
        super().__init__(message)
        self.details = details


class StorageError(UserError, OSError):
    """A store at a URL failed for as long as it was tried again."""

    exit_code = 1


class AccessError(StorageError):
    """A store refuses the credentials, or there are none."""

    exit_code = 2


class RangesError(StorageError):
    """A web server sends whole files where a part is asked for."""

    exit_code = 2


class SpaceError(UserError):
    """A disk or /dev/shm is too small for what was asked."""


def printable(name: str) -> str:
    """A file's or class's name for people: line breaks, terminal codes and undecodable bytes as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


def exit_cleanly(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and exit: 0 or its return value, a :class:`UserError`'s code, 130 on Ctrl-C.

    When nobody reads on (``| head``) it ends quietly with 141, as programs do that SIGPIPE ends.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: file names may hold any bytes
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        code = 141
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or 0)
