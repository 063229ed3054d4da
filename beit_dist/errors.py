"""The exceptions a user can act on, and how a command ends when one is raised."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can fix. It is printed without a traceback; the process exits with ``exit_code``.

    Exit code 2 tells schedulers that no retry helps; 1 that one might.
    """

    exit_code = 2
    of_one_rank = False
    """Whether it is only this process that can know of it; what all ranks find alike, one of them says."""


class ConfigError(UserError):
    """A setting is wrong.

    Args:
        field: dotted name of the setting, as the user would write it (``model.patch_size``).
        got: the offending value.
        expected: what would have been accepted.
        way_out: what to change, if there is more to say than ``expected``.
    """

    def __init__(self, field: str, got: object, expected: str, way_out: str = "") -> None:
        self.field, self.got, self.expected, self.way_out = field, got, expected, way_out
        text = f"{field}: got {got!r}, expected {expected}"
        super().__init__(f"{text}. {way_out}" if way_out else text)

    def named(self, field: str) -> ConfigError:
        """The same error for another setting, for code that does not know which setting it was given."""
        return ConfigError(field, self.got, self.expected, self.way_out)


class DataError(UserError):
    """Images, shards or a manifest are missing, foreign or damaged."""


class SampleError(DataError):
    """A sample could not be read whole during a run; another attempt may succeed."""

    exit_code = 1


class MissingShardError(SampleError):
    """A shard that the manifest lists is not there during a run."""


class TokenizerError(UserError):
    """A tokenizer file is missing, damaged, or not the one that was asked for."""


class WeightsError(UserError):
    """A file of weights is missing, damaged, not of this model, or would run code if it were loaded."""


class CheckpointError(UserError):
    """A checkpoint cannot be used, or the folder holds another run."""


class PreflightError(UserError):
    """A host cannot do what the run asks of it. Found before anything is allocated."""


class TrainingError(UserError):
    """The run cannot continue; another start may succeed.

    Args:
        message: for a person.
        details: what is too long for a message; goes into the marker ``FAILED``.
    """

    exit_code = 1

    def __init__(self, message: str, details: object = None) -> None:
        super().__init__(message)
        self.details = details


class StorageError(UserError, OSError):
    """A store at a URL kept failing until the time for retries was over."""

    exit_code = 1


class AccessError(StorageError):
    """A store refuses the credentials, or there are none."""

    exit_code = 2


class RangesError(StorageError):
    """A web server sends whole files although a part was requested."""

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

    If nobody reads the output any more (``| head``), it ends quietly with 141, as SIGPIPE would have it.
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
