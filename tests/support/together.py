"""Ranks as threads of one process: they agree through memory, so a test of many ranks starts nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from beit_dist.engine.ranks.distributed import Ranks

Result = TypeVar("Result")


class Together:
    """Stands in for an ``Agreement``, of one of the threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.ranks = Ranks(rank, barrier.parties)
        self._barrier, self._board = barrier, board

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        self._board[self.ranks.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]


def together(world: int, run: Callable[[Any], Result]) -> list[Result]:
    """What each of ``world`` ranks returns, given its agreement. A rank that fails ends the others."""
    barrier, board = threading.Barrier(world), [None] * world

    def one(rank: int) -> Result:
        try:
            return run(Together(rank, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as threads:
        ended = [threads.submit(one, rank) for rank in range(world)]
    errors = [error for each in ended if (error := each.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause, and not what it led to
    return [each.result() for each in ended]
