"""A section of the page: what it shows of the runs, or one line that says why it shows nothing, and what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from beit_dist.errors import UserError
from beit_dist.reports.html.subject import Subject

Content = TypeVar("Content")


@dataclass(frozen=True)
class Missing:
    """Why something is not shown."""

    why: str
    """A sentence or two: the reason, and what to do about it."""


@dataclass(frozen=True)
class Part(Generic[Content]):
    """What a section shows of one run."""

    run: Subject
    content: Content


@dataclass(frozen=True)
class Section(Generic[Content]):
    """What a section shows of all runs of which it can."""

    parts: tuple[Part[Content], ...]
    left_out: tuple[tuple[Subject, str], ...]
    """Runs that it does not show, and why."""


def attempted(find: Callable[[], Content | Missing]) -> Content | Missing:
    """What is found, or why nothing is.

    A damaged file, or one that is gone, leaves its part out, whatever it leads to: the rest of the page is worth
    having. What is not foreseen is logged with its traceback.
    """
    try:
        return find()
    except (UserError, OSError, EOFError) as error:
        return Missing(str(error))
    except Exception as error:
        logging.getLogger(__name__).exception("a part of the report is left out")
        return Missing(f"{type(error).__name__}: {error}")


def section_of(
    runs: Iterable[Subject], concerns: Callable[[Subject], bool], find: Callable[[Subject], Content | Missing]
) -> Section[Content]:
    """Find what a section shows, of each run that it can.

    Args:
        runs: of the page.
        concerns: whether the section is of interest for a run.
        find: of a run.
    """
    parts: list[Part[Content]] = []
    left_out: list[tuple[Subject, str]] = []
    for run in runs:
        if not concerns(run):
            continue
        found = attempted(partial(find, run))
        if isinstance(found, Missing):
            left_out.append((run, found.why))
        else:
            parts.append(Part(run, found))
    return Section(tuple(parts), tuple(left_out))
