"""Micro-batches reach the device in their order, each sent before the one ahead of it is worked on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit_dist.engine.transfer import Transfer


def test_on_a_cpu_micro_batches_are_what_they_were() -> None:
    given = [(torch.arange(3), None), (torch.arange(3, 6), None)]
    taken = list(Transfer(torch.device("cpu")).send(given))
    assert [rows[0] is one[0] and rows[1] is None for rows, one in zip(taken, given, strict=True)] == [True, True]


def test_on_a_gpu_the_next_one_is_under_way_and_none_is_used_before_it_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With streams that only note what is asked of them."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.sent = 0

        def __enter__(self) -> None:
            log.append("side")

        def __exit__(self, *_: Any) -> None:
            log.append("back")

        def record_event(self) -> str:
            self.sent += 1
            return str(self.sent)

        def wait_event(self, event: str) -> None:
            log.append(f"wait {event}")

    class Rows:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device, non_blocking: bool) -> Rows:
            log.append(f"copy {self.number} to {device}, {non_blocking}")
            return self

        def record_stream(self, stream: Stream) -> None:
            log.append(f"keep {self.number}")

    computing = Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    given: Any = [(Rows(1), None), (Rows(2), None)]
    arrivals = Transfer(torch.device("cuda:1")).send(given)
    assert log == ["side", "copy 1 to cuda:1, True", "back"], "the first is sent before it is asked for"
    log.clear()
    assert next(arrivals) == given[0]
    assert log == ["side", "copy 2 to cuda:1, True", "back", "wait 1", "keep 1"]
    log.clear()
    assert next(arrivals) == given[1]
    assert log == ["wait 2", "keep 2"]
    assert next(arrivals, None) is None
