"""The checkpoint folder where there are no renames and no links."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from typing import Any

import pytest
import torch
from engine.checkpoint.test_store import State, save
from support.shelf import ShelfPlace

from beit_dist.checkpoints.layout import Fragment, Saved, committed, rank_records
from beit_dist.checkpoints.ranges import FragmentReader
from beit_dist.config.run import CheckpointConfig
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.checkpoint.keeping import kept_for_good
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.errors import CheckpointError
from beit_dist.storage.opening import STORES, open_place
from beit_dist.storage.place import Place


@pytest.fixture(params=["memory", "shelf"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder of checkpoints in a store of fsspec, and in one that was added."""
    monkeypatch.setitem(STORES, "shelf", ShelfPlace)
    return open_place(f"{request.param}://{uuid.uuid4()}/run/checkpoints")


def store(place: Place, **settings: Any) -> CheckpointStore:
    opened = CheckpointStore(place, CheckpointConfig(**settings), Agreement(Ranks(), timedelta(seconds=5)))
    opened.begin_attempt()
    return opened


def test_checkpoints_are_saved_kept_and_restored(place: Place) -> None:
    writer = store(place, keep=2)
    for step in (1, 2, 3):
        assert save(writer, step, State(float(step)))
    assert [saved.step for saved in committed(place)] == [3, 2]
    assert place.read("latest") == b"step-00000003.a0001\n"
    reader, found = store(place), State(0.0)
    newest = reader.newest_whole()
    assert newest is not None
    reader.restore(newest, found)
    assert all(torch.equal(a.data, b.data) for a, b in zip(found.tensors, State(3.0).tensors, strict=True))


def test_a_flipped_byte_sends_to_the_checkpoint_before_and_marks_the_folder(place: Place) -> None:
    writer = store(place)
    for step in (1, 2):
        save(writer, step, State(float(step)))
    damaged = place / "step-00000002.a0001"
    content = bytearray(damaged.read("rank-00000.safetensors"))
    content[-1] ^= 1
    damaged.write("rank-00000.safetensors", bytes(content))
    newest = store(place).newest_whole()
    assert newest is not None
    assert newest.step == 1
    assert damaged.exists("BAD")
    assert [saved.step for saved in committed(place)] == [1]


def test_a_newer_attempt_stops_an_older_one_and_its_checkpoint_does_not_appear(place: Place) -> None:
    older = store(place)
    save(older, 1, State(1.0))
    newer = store(place)
    older.begin_save(2, State(2.0), {})
    with pytest.raises(SupersededError, match="superseded by attempt 2"):
        older.finish_save()
    assert save(newer, 2, State(5.0))
    assert [(saved.step, saved.attempt) for saved in committed(place)] == [(2, 2), (1, 1)]


def test_of_two_starts_with_one_number_the_first_stops_before_it_commits(place: Place) -> None:
    """A store whose conditional PUT is not atomic lets both succeed; the last one's content stays."""
    first = store(place)
    place.write("attempts/000001", b"of another start")
    first.begin_save(1, State(1.0), {})
    with pytest.raises(SupersededError, match="also took number 1"):
        first.finish_save()
    assert committed(place) == []


def test_local_files_go_with_a_checkpoint_and_are_verified(place: Place, tmp_path: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    writer = store(place)
    writer.begin_save(1, State(1.0), {}, {"metrics.jsonl": path})
    writer.finish_save()
    assert place.parent.read("metrics.jsonl") == path.read_bytes()
    folder = committed(place)[0].folder
    assert folder.read("metrics.jsonl") == path.read_bytes()
    folder.write("metrics.jsonl", b'{"step": 2}\n')
    assert store(place).newest_whole() is None


def test_a_chunk_that_rots_after_the_start_is_not_read(place: Place) -> None:
    save(store(place), 1, State(1.0))
    saved = committed(place)[0]
    reader = FragmentReader(saved.folder, rank_records(saved))
    content = bytearray(saved.folder.read("rank-00000.safetensors"))
    content[-1] ^= 1
    saved.folder.write("rank-00000.safetensors", bytes(content))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is damaged"):
        reader.fill(Fragment("b", "exp_avg", 8, torch.empty(2)))


def test_one_every_so_many_hours_is_kept_for_good(place: Place) -> None:
    found = [Saved(place, step, 1, {"saved_at": 1000.0 + 1800 * step}) for step in range(8, 0, -1)]
    kept = kept_for_good(found, CheckpointConfig(keep_every_hours=1.0, keep_every_steps=6))
    assert sorted({saved.step for saved in kept}) == [1, 3, 5, 6, 7]


def test_a_clock_that_was_wrong_for_a_while_does_not_end_what_is_kept_for_good(place: Place) -> None:
    hour = 3600.0
    clock = [100 * hour, 1.0 * hour, 1.5 * hour, 2.0 * hour]  # it was ahead until the first checkpoint was saved
    found = [Saved(place, step, 1, {"saved_at": at}) for step, at in enumerate(clock, start=1)]
    kept = kept_for_good(found, CheckpointConfig(keep_every_hours=1.0))
    assert sorted(saved.step for saved in kept) == [1, 2, 4]


def test_the_manifest_is_json_for_anyone(place: Place) -> None:
    save(store(place), 1, State(1.0), {"position": {"consumed": 3}})
    assert json.loads((place / "step-00000001.a0001").read("manifest.json"))["position"] == {"consumed": 3}
