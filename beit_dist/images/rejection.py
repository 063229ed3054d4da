"""Why an image cannot be used."""

from __future__ import annotations

from typing import Literal

RejectKind = Literal["not_an_image", "damaged", "too_large", "too_small", "value_range"]
"""Classes of reasons, few enough to count by."""


class ImageRejectedError(Exception):
    """An image cannot be used; the message is the reason, the same in every run."""

    def __init__(self, reason: str, kind: RejectKind) -> None:
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type[ImageRejectedError], tuple[str, RejectKind]]:
        return type(self), (str(self), self.kind)


class ChangedError(Exception):
    """An image is not the one that was listed; the message says what is there instead."""


def damaged(reason: str) -> ImageRejectedError:
    """The error for an image whose bytes are not those that were written."""
    return ImageRejectedError(reason, "damaged")
