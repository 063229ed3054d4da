"""Micro-batches on their way to a GPU beside what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Rows = tuple[Tensor | None, ...]


class Transfer:
    """Copies micro-batches to a device, the next one while the one before is worked on.

    On a GPU copies have a stream of their own. The first copy of a batch begins when the loader hands the batch
    over, so it has ended before the step begins. What is copied from is page-locked memory, which stays as it is
    until two more batches have come (``stream/loading.py``). On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, micro_batches: Iterable[Rows]) -> Iterator[Rows]:
        """The same on the device, in their order."""
        if self._side is None:
            return map(self._moved, micro_batches)
        sent = map(self._sent, micro_batches)
        return self._arrivals(next(sent, None), sent)

    def _moved(self, rows: Rows) -> Rows:
        return tuple(None if one is None else one.to(self._device, non_blocking=True) for one in rows)

    def _sent(self, rows: Rows) -> tuple[Rows, torch.cuda.Event]:
        assert self._side is not None  # for the type checker
        with torch.cuda.stream(self._side):
            return self._moved(rows), self._side.record_event()

    def _arrivals(
        self, coming: tuple[Rows, torch.cuda.Event] | None, others: Iterator[tuple[Rows, torch.cuda.Event]]
    ) -> Iterator[Rows]:
        while coming is not None:
            (rows, arrived), coming = coming, next(others, None)
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            for one in rows:
                if one is not None:
                    one.record_stream(computing)  # else its memory could be given to a copy while it is read
            yield rows
