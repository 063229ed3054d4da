"""Shards at a URL: blocks are fetched once and ahead, within the memory that was said, and read as local ones."""

from __future__ import annotations

import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.fault_proxy import Fault, FaultProxy
from support.stream_data import DataSet, assert_equal, copied

from beit_dist.errors import SampleError, StorageError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.remote import RemotePlace
from beit_dist.stream import counts
from beit_dist.stream.fetching import Extent, RemoteReader
from beit_dist.stream.held import ring_of
from beit_dist.stream.lookahead import BlocksAhead, SamplesAhead
from beit_dist.stream.readers import open_reader

SHARD = bytes(range(200))
STRIDE = 10


class Requests:
    """The range reads of this process, as they come in; can hold them up, or change what they get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.running = self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self.change: Callable[[tuple[str, int, int], Any], Any] = lambda request, content: content
        self._lock = threading.Lock()
        read = RemotePlace.read_range

        def noted(place: RemotePlace, name: str, offset: int, size: int) -> Any:
            request = name, offset, size
            with self._lock:
                self.seen.append(request)
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                assert self.gate.wait(30)
                return self.change(request, read(place, name, offset, size))
            finally:
                with self._lock:
                    self.running -= 1

        monkeypatch.setattr(RemotePlace, "read_range", noted)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    return Requests(monkeypatch)


@pytest.fixture
def reader() -> Iterator[RemoteReader]:
    place = open_place(f"memory://{uuid.uuid4()}/shards")
    place.write("v00/0.tar", SHARD)
    place.write("v00/1.tar", SHARD[::-1])
    opened = open_reader(place)
    assert isinstance(opened, RemoteReader)
    yield opened
    opened.close()


def read(reader: RemoteReader, offset: int, *sizes: int, shard: str = "v00/0.tar", fresh: bool = False) -> bytes:
    buffers = [bytearray(size) for size in sizes]
    reader.read_into(shard, offset, [memoryview(buffer) for buffer in buffers], fresh=fresh)
    return b"".join(buffers)


def extent(first: int, samples: int, shard: str = "v00/0.tar") -> Extent:
    return Extent(shard, first * STRIDE, samples, STRIDE)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------ the reader


def test_what_is_held_is_fetched_once_and_at_once_and_the_rest_when_asked_for(
    reader: RemoteReader, requests: Requests
) -> None:
    reader.hold(extent(2, 4))
    until(lambda: requests.seen == [("v00/0.tar", 20, 40)])
    for sample in (3, 2, 5, 3):
        assert read(reader, 10 * sample, 3, 0, 7) == SHARD[10 * sample : 10 * sample + 10]
    assert len(requests.seen) == 1
    assert read(reader, 60, 10) == SHARD[60:70]
    assert read(reader, 20, 10, shard="v00/1.tar") == SHARD[::-1][20:30]
    assert requests.seen[1:] == [("v00/0.tar", 60, 10), ("v00/1.tar", 20, 10)]


def test_a_sample_read_again_comes_from_the_store(reader: RemoteReader, requests: Requests) -> None:
    requests.change = lambda request, content: content if request[2] == 10 else bytes(len(content))
    reader.hold(extent(0, 4))
    assert read(reader, 10, 10) == bytes(10)
    assert read(reader, 10, 10, fresh=True) == SHARD[10:20]


def test_what_is_held_twice_is_there_until_it_was_released_twice(reader: RemoteReader, requests: Requests) -> None:
    reader.hold(extent(0, 4))
    reader.hold(extent(0, 4))
    reader.hold(extent(2, 4))
    reader.release(extent(0, 4))
    assert read(reader, 10, 10) == SHARD[10:20]
    reader.release(extent(0, 4))
    assert read(reader, 30, 10) == SHARD[30:40]
    assert len(requests.seen) == 2
    reader.release(extent(2, 4))
    assert not reader._held
    assert not reader._samples
    assert read(reader, 30, 10) == SHARD[30:40]
    assert len(requests.seen) == 3


def test_so_many_ranges_are_fetched_at_once_and_what_is_released_before_is_not(
    reader: RemoteReader, requests: Requests
) -> None:
    requests.gate.clear()
    for sample in range(15):
        reader.hold(extent(sample, 1))
    until(lambda: requests.running == reader.in_flight)
    reader.release(extent(14, 1))
    requests.gate.set()
    assert [read(reader, 10 * sample, 10) for sample in range(14)] == [
        SHARD[10 * sample : 10 * sample + 10] for sample in range(14)
    ]
    assert requests.most == reader.in_flight == 8
    assert len(requests.seen) == 14


def test_a_shard_cut_short_costs_the_samples_that_are_not_there(reader: RemoteReader) -> None:
    reader.place.write("v00/0.tar", SHARD[:45])
    reader.hold(extent(2, 4))
    assert read(reader, 30, 10) == SHARD[30:40]
    with pytest.raises(SampleError, match=r"v00/0\.tar: byte 40: expected 10 bytes, .* has 45; .* cut short"):
        read(reader, 40, 10)
    with pytest.raises(SampleError, match=r"v00/9\.tar: not found"):
        read(reader, 0, 10, shard="v00/9.tar")


def test_a_store_that_fails_for_good_is_no_damaged_sample(reader: RemoteReader, requests: Requests) -> None:
    def fail(request: object, content: object) -> None:
        raise StorageError("no answer")

    requests.change = fail
    reader.hold(extent(0, 4))
    for fresh in (False, True):
        with pytest.raises(StorageError, match="no answer"):
            read(reader, 0, 10, fresh=fresh)


def test_a_reader_sent_to_another_process_holds_nothing(reader: RemoteReader) -> None:
    reader.hold(extent(0, 4))
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._held
    assert read(copy, 10, 10) == SHARD[10:20]


# ---------------------------------------------------------------------------------------------- the lookahead


@pytest.fixture
def stored(data: DataSet) -> DataSet:
    """The data set in memory, at a URL."""
    url = f"memory://{uuid.uuid4()}/shards"
    for name in ["manifest.json", *(shard.name for shard in data.manifest.shards)]:
        open_place(url).write(name, (data.root / name).read_bytes())
    return data.at(url)


def held_bytes(reader: RemoteReader) -> int:
    return sum(one.samples * one.stride for one in reader._held)


def pieces_of(data: DataSet, positions: int) -> Iterator[tuple[str, int, int]]:
    """The ranges that whole pieces of blocks take, of all lanes up to a position."""
    stride = data.manifest.layout.stride
    for lane in range(data.plan.lanes):
        position = 0
        while position < positions:
            window = data.plan.window(lane, position)
            for piece in window.pieces:
                name = data.manifest.view_shards(piece.view)[piece.shard].name
                yield name, piece.row * stride, piece.rows * stride
            position = window.end


@pytest.mark.parametrize(("window", "per_lane"), [(1, 2), (2, 2), (1, 7)])
def test_each_block_is_fetched_once_and_ahead_within_the_ring(
    stored: DataSet, window: int, per_lane: int, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = DataSet(stored.root, stored.manifest, lanes=4, block_samples=3, window_blocks=window).at(stored.where)
    batch = 4 * per_lane
    limit, most = ring_of(own.plan, own.manifest.layout, range(batch), per_lane), 0
    hold = RemoteReader.hold

    def noted(reader: RemoteReader, one: Extent) -> None:
        nonlocal most
        hold(reader, one)
        most = max(most, held_bytes(reader))

    monkeypatch.setattr(RemoteReader, "hold", noted)
    steps = own.plan.samples // batch  # within an epoch
    assert steps > 0
    counts.take()
    others = set(threading.enumerate())
    for step, rows in enumerate(own.take(steps, batch=batch)):
        assert_equal(rows, own.stored(per_lane * step, batch))
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith("fetch-"):  # what it has asked for is counted when it is there
            thread.join(60)
    stride = own.manifest.layout.stride
    assert set(requests.seen) <= set(pieces_of(own, (steps + 3) * per_lane + 2 * window * 3))
    fetched = [(name, offset + at) for name, offset, size in requests.seen for at in range(0, size, stride)]
    assert len(set(fetched)) == len(fetched) or per_lane == 7  # which reads ahead into later epochs
    assert 0.5 * limit < most <= limit == 4 * 2 * window * 3 * stride
    read_bytes = counts.take()["beit_data_read_bytes"]
    assert read_bytes == {"store": sum(size for *_, size in requests.seen)}


def test_blocks_beyond_the_memory_are_read_by_sample_with_a_notice(
    stored: DataSet, requests: Requests, caplog: pytest.LogCaptureFixture
) -> None:
    stride = stored.manifest.layout.stride
    with caplog.at_level(logging.WARNING):
        batches = stored.batches(memory_gib=1e-6)
    assert batches._pipeline.ahead is SamplesAhead
    assert "loader.memory_gib: 1e-06 is too little" in caplog.text
    for step in range(12):
        assert_equal(copied(next(batches)), stored.stored(2 * step, 8))
    batches.close()
    assert {size for _, _, size in requests.seen} == {stride}
    caplog.clear()
    fits = stored.batches(memory_gib=ring_of(stored.plan, stored.manifest.layout, range(8), 2) / 2**30)
    assert fits._pipeline.ahead is BlocksAhead
    fits.close()
    assert not caplog.records


def test_damage_on_the_way_is_healed_and_counted(stored: DataSet, requests: Requests) -> None:
    stride = stored.manifest.layout.stride

    def damage(request: tuple[str, int, int], content: bytes) -> bytes:
        return content if request[2] % stride else bytes([content[0]]) + bytes(len(content) - 1)

    requests.change = damage
    counts.take()
    assert_equal(stored.take(1)[0], stored.stored(0, 8))
    assert counts.take()["beit_data_samples_read_again"]["whole"] > 0


@pytest.mark.parametrize("memory", [4.0, 1e-6])
def test_ends_and_restarts_leave_nothing_held(stored: DataSet, memory: float) -> None:
    batches = stored.batches(memory_gib=memory)
    next(batches)
    pipeline = batches._pipeline
    batches.close()
    again = iter(pipeline)
    pipeline.load_state_dict({"consumed": 7})
    pipeline.memory = batches._held[0].memory
    next(again)
    assert isinstance(pipeline.reader, RemoteReader)
    assert pipeline.reader._held
    again.close()
    assert not pipeline.reader._held
    ids = batches._held[0].tensors["sample_ids"].numpy()
    np.testing.assert_array_equal(ids, stored.stored(7, 8)["sample_ids"])


def test_what_workers_count_reaches_their_rank(served: DataSet) -> None:
    counts.take()
    with FaultProxy(served.where) as proxy:
        proxy.inject(Fault("slow_down", path="/v00/", times=3), Fault("cut", path="/v00/", times=2, after=100))
        batches = served.at(proxy.url).batches(workers=2, world=1)
        for step in range(3):
            assert_equal(copied(next(batches)), served.stored(2 * step, 8))
        batches.close()
        assert proxy.injected == {"slow_down": 3, "cut": 2}
    found = counts.take()
    assert found["beit_storage_retries"] == {"throttled": 3, "cut": 2}
    assert found["beit_data_read_bytes"]["store"] >= 3 * 8 * served.manifest.layout.stride / 2


def test_a_store_that_is_down_ends_the_stream_with_what_it_said(served: DataSet) -> None:
    with FaultProxy(served.where) as proxy:
        proxy.inject(Fault("slow_down"))
        batches = served.at(proxy.url).batches(workers=1, access=Access(retry_seconds=0.5))
        with pytest.raises(StorageError, match=r"v0\d/shard-.*Raise storage\.retry_seconds"):
            next(batches)
        batches.close()
