"""A tokenizer's own pictures: what its tokens draw of held-out images, as the run left it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from PIL import Image

from beit_dist.reports.html.embedded import as_uri
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject

_WIDEST = 1400
_SHEET = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Sheet:
    """Held-out images over what their tokens draw, and the tokens."""

    step: int
    picture: str


def sheet_of(run: Subject) -> Sheet | Missing:
    """The newest of a run.

    Raises:
        OSError: it is damaged.
    """
    names = run.place.list("pictures") if run.place.exists("pictures") or run.place.is_local else []
    found = sorted((int(match[1]), match[0]) for name in names if (match := _SHEET.fullmatch(name)))
    if not found:
        return Missing("The run has drawn nothing yet. It does after its first measurement.")
    step, name = found[-1]
    content = run.place.read(f"pictures/{name}")
    return Sheet(step, as_uri(Image.open(io.BytesIO(content)), _WIDEST))
