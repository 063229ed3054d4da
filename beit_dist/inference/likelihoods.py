"""The likeliest classes of images as columns of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.inference.formats.table import Column, told

NAME, PROBABILITY, SHARE = "class", "probability", "share"


def ranked_columns(top: int, number: str) -> tuple[Column, ...]:
    """``class_1``, ``probability_1``, ``class_2``, ..., for the first ``top`` classes."""
    pairs = ((Column(NAME, "text", place=place), Column(number, "number", place=place)) for place in _places(top))
    return tuple(column for pair in pairs for column in pair)


def ranked_values(
    read: Callable[[], NDArray[np.float32]], classes: Sequence[str], top: int, number: str
) -> Mapping[str, Callable[[], Any]]:
    """Their values for the rows that ``read`` reads: (n, K). Of equals, the first class comes first.

    A class that has no share is not named.
    """
    names = [told(name) for name in classes]

    @cache
    def ranked() -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        values = read()
        order = np.argsort(-values, axis=1, kind="stable")[:, :top]
        return order, np.take_along_axis(values, order, 1)

    def class_of(place: int) -> Callable[[], list[str | None]]:
        def named() -> list[str | None]:
            order, values = (each[:, place - 1].tolist() for each in ranked())
            there = [bool(value) or number != SHARE for value in values]
            return [names[each] if own else None for each, own in zip(order, there, strict=True)]

        return named

    def number_of(place: int) -> Callable[[], NDArray[np.float32]]:
        return lambda: ranked()[1][:, place - 1]

    named = {Column(NAME, "text", place=place).title: class_of(place) for place in _places(top)}
    return {**named, **{Column(number, "number", place=place).title: number_of(place) for place in _places(top)}}


def _places(top: int) -> range:
    return range(1, top + 1)
