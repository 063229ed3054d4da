"""Stages that overlap: a thread works ahead of whoever takes its results, by a bounded number of them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import Full, Queue
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
_POLL = 0.1  # seconds; how soon a thread notices that nobody takes its results any more


class _Result(NamedTuple, Generic[Item]):
    """An item, or how the work ended: with an error, or None at the end."""

    item: Item | None
    ended: bool = False
    error: BaseException | None = None


def ahead(
    items: Iterable[Item], depth: int, stopped: threading.Event | None = None
) -> Generator[Item, None, None]:
    """``items``, made in a thread of their own, up to ``depth`` of them before they are taken.

    What the thread raises is raised here, after all that came before it. When the caller stops early the thread
    ends with the item it is at, or sooner if the maker of ``items`` looks at ``stopped``.
    """
    results: Queue[_Result[Item]] = Queue(depth)
    stopped = stopped or threading.Event()

    def put(result: _Result[Item]) -> bool:
        while not stopped.is_set():
            try:
                results.put(result, timeout=_POLL)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        source = iter(items)
        try:
            for item in source:
                if not put(_Result(item)):
                    return
        except BaseException as error:  # the caller's thread decides what becomes of it
            put(_Result(None, ended=True, error=error))
        else:
            put(_Result(None, ended=True))
        finally:
            if isinstance(source, Generator):
                source.close()  # ends the stages before this one, too

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, ended, error = results.get()
            if error is not None:
                raise error
            if ended:
                return
            yield item  # type: ignore[misc]  # None stands for the end only
    finally:
        stopped.set()
        thread.join()
