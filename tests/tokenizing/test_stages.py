"""Stages that overlap: in order, bounded, ended by whoever stops taking, and honest about what failed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beit_dist.errors import SampleError
from beit_dist.images import decoding as images
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing.ahead import ahead
from beit_dist.tokenizing.commits import read_commit
from beit_dist.tokenizing.decoding import Decoders, Recipe, decode_listed
from beit_dist.tokenizing.shard_files import ShardFiles
from beit_dist.tokenizing.sources import SourceList

RECIPE = Recipe(1, 16, 16, 8, "random", 0)


class Counted:
    """Numbers, and how many of them were asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.made, self.closed, self._fails_at = 0, threading.Event(), fails_at
        self.two_ahead = threading.Event()

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(100):
                if number == self._fails_at:
                    raise ValueError("in the middle")
                self.made += 1
                if self.made == 4:
                    self.two_ahead.set()
                yield number
        finally:
            self.closed.set()


def test_items_come_in_order_and_no_more_than_the_depth_ahead() -> None:
    source = Counted()
    taken = ahead(source, 2)
    assert next(taken) == 0
    assert source.two_ahead.wait(60)  # one taken, two waiting, one in the hands of the thread
    threading.Event().wait(0.2)
    assert source.made == 4
    assert list(taken) == list(range(1, 100))


def test_an_error_comes_after_what_was_made_before_it() -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match="in the middle"):
        seen.extend(ahead(Counted(fails_at=5), 2))
    assert seen == [0, 1, 2, 3, 4]


def test_who_stops_taking_ends_all_stages_before() -> None:
    source = Counted()
    before = set(threading.enumerate())  # threads of other tests may end at any time
    taken = ahead(ahead(source, 1), 1)
    next(taken)
    assert len(set(threading.enumerate()) - before) == 2
    taken.close()
    assert source.closed.is_set()
    assert set(threading.enumerate()) <= before


def test_the_encoder_works_on_the_next_shard_while_one_is_written_and_another_published(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing shard 0 waits until the encoder has seen images of shard 1."""
    from beit_dist.tokenizing import worker as worker_module

    honest, calls, seen_next = bench.encoder, 0, threading.Event()

    def encode(pixels: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:  # 2 batches of a shard in 2 views
            seen_next.set()
        return honest(pixels)

    original = worker_module.write_commit

    def write_commit(out: Any, commit: Any) -> None:
        assert seen_next.wait(60), "nothing was encoded while shard 0 was not committed"
        original(out, commit)

    bench.encoder = encode
    monkeypatch.setattr(worker_module, "write_commit", write_commit)
    assert bench.work(tmp_path / "out").made == 4


@pytest.mark.parametrize("stage", ["encode", "write"])
def test_a_worker_that_fails_has_ended_its_stages(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Left to the garbage collector they might be waited for by a thread that they wait for."""

    def fail(*_: Any) -> Any:
        raise SampleError("broken")

    if stage == "encode":
        bench.encoder = fail
    else:
        monkeypatch.setattr(ShardFiles, "write", fail)
    with pytest.raises(SampleError, match="broken") as raised:
        bench.work(tmp_path / "out")
    assert raised.tb is not None  # it holds the frames and what they made
    assert [thread.name for thread in threading.enumerate() if "(work)" in thread.name] == []


def test_ctrl_c_does_not_wait_for_the_other_views_of_a_batch(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beit_dist.tokenizing import worker as worker_module

    honest, calls, in_the_second_batch = bench.encoder, 0, threading.Event()
    stops: list[threading.Event] = []

    def noting(items: Any, depth: int, *stopped: threading.Event) -> Any:
        stops.extend(stopped)
        return ahead(items, depth, *stopped)

    def encode(pixels: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:  # after 8 views of the first batch
            in_the_second_batch.set()
            assert all(stopped.wait(60) for stopped in stops)
        return honest(pixels)

    def interrupted(*_: object) -> None:
        assert in_the_second_batch.wait(60)
        raise KeyboardInterrupt

    bench.encoder = encode
    monkeypatch.setattr(worker_module, "ahead", noting)
    monkeypatch.setattr(worker_module.ShardFiles, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.work(tmp_path / "out", views=8)
    assert calls == 9


def test_a_decoding_process_that_is_killed_ends_the_worker_with_a_reason(bench: Any, tmp_path: Path) -> None:
    out = LocalPlace(tmp_path / "out")
    bench.job(tmp_path / "out")
    sources = SourceList(out, 99).read(0) * 20
    with Decoders(RECIPE, 2) as decoders:
        decoded = decoders.decode(sources)
        next(decoded)
        os.kill(decoders._processes[1].pid or 0, signal.SIGKILL)
        with pytest.raises(SampleError, match="a decoding process died"):
            list(decoded)
    assert all(process.exitcode is not None for process in decoders._processes)
    assert read_commit(out, 0) is None


def test_too_little_memory_is_no_fault_of_the_image(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected here, the image would be a sample on another machine."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    bench.job(tmp_path / "out")
    source = SourceList(LocalPlace(tmp_path / "out"), 99).read(0)[0]
    monkeypatch.setattr(images, "to_rgb", no_memory)
    with pytest.raises(SampleError, match=r"\.png: not enough memory to decode it"):
        decode_listed(RECIPE, source, Path(source.place).read_bytes())
