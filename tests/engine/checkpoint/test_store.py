"""A checkpoint exists whole or not at all; the newest whole one is found; the newer of two runs goes on."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from beit_dist.checkpoints.files import write_fragments
from beit_dist.checkpoints.image import FileImage
from beit_dist.checkpoints.layout import Fragment, Saved, committed, rank_records
from beit_dist.checkpoints.ranges import FragmentReader
from beit_dist.config.run import CheckpointConfig
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.errors import CheckpointError
from beit_dist.storage import durable
from beit_dist.storage.local import LocalPlace


class State:
    """Stands in for the engine: a few fragments in memory."""

    def __init__(self, value: float) -> None:
        self.tensors = [Fragment("a.weight", "weight", 0, torch.full((3000,), float(value)))]
        self.tensors += [Fragment("b", role, 7, torch.full((5,), float(value))) for role in ("weight", "exp_avg")]
        self.updates = 0
        self.loss_scale: dict[str, float] = {}

    def saved_fragments(self) -> list[Fragment]:
        return self.tensors

    held_fragments = saved_fragments

    def publish(self, updates: int) -> None:
        self.updates = updates


def store(folder: Path, **settings: Any) -> CheckpointStore:
    opened = CheckpointStore(
        LocalPlace(folder), CheckpointConfig(**settings), Agreement(Ranks(), timedelta(seconds=5))
    )
    opened.begin_attempt()
    return opened


def save(writer: CheckpointStore, step: int, state: State, facts: dict[str, Any] | None = None) -> bool:
    """Save and wait."""
    writer.begin_save(step, state, facts or {})
    result = writer.finish_save()
    return result is None or result.ok


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1, 2 and 3, of values 1.0, 2.0 and 3.0."""
    writer = store(tmp_path)
    for step in (1, 2, 3):
        assert save(writer, step, State(step), {"note": f"step {step}"})
    return tmp_path


def newest(folder: Path) -> Saved:
    found = store(folder).newest_whole()
    assert found is not None
    return found


def test_what_was_saved_is_restored_bit_for_bit(tmp_path: Path) -> None:
    state = State(0)
    state.updates = 42
    with torch.no_grad():
        state.tensors[0].data.copy_(torch.randn(3000, generator=torch.Generator().manual_seed(1)))
    writer = store(tmp_path)
    assert save(writer, 9, state, {"position": {"consumed": 5}})
    other = State(-1)
    saved = newest(tmp_path)
    store(tmp_path).restore(saved, other)
    assert (saved.step, saved.manifest["position"], other.updates) == (9, {"consumed": 5}, 42)
    assert all(torch.equal(a.data, b.data) for a, b in zip(state.tensors, other.tensors, strict=True))


def test_the_files_are_plain_safetensors(three: Path) -> None:
    with safe_open(str(three / "step-00000003.a0001" / "rank-00000.safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("weight/a.weight@0"), torch.full((3000,), 3.0))


def test_fragments_are_read_across_other_cuts(tmp_path: Path) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for rank, (low, high) in enumerate([(0, 37), (37, 40), (40, 100)]):
        write_fragments(LocalPlace(tmp_path), rank, FileImage.of([Fragment("p", "weight", low, values[low:high])]))
    records = [json.loads((tmp_path / f"rank-{rank:05d}.json").read_bytes()) for rank in range(3)]
    reader = FragmentReader(LocalPlace(tmp_path), records)
    for low, high in [(0, 100), (36, 41), (99, 100), (38, 39)]:
        wanted = Fragment("p", "weight", low, torch.zeros(high - low))
        reader.fill(wanted)
        assert torch.equal(wanted.data, values[low:high])
    with pytest.raises(CheckpointError, match="holds 10 of 20 values of p"):
        reader.fill(Fragment("p", "weight", 90, torch.zeros(20)))


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a byte of the weights": lambda folder: _flip(folder / "rank-00000.safetensors", -1),
    "a byte of the header": lambda folder: _flip(folder / "rank-00000.safetensors", 20),
    "a byte of the checksums": lambda folder: _flip(folder / "rank-00000.json", 30),
    "a digit of the position": lambda folder: (
        (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"note": "step 3"', '"note": "step 4"')
        )
        and None
    ),
    "half of the manifest": lambda folder: (
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:100]) and None
    ),
    "a truncated file": lambda folder: (folder / "rank-00000.safetensors").write_bytes(b"1234") and None,
    "a removed file": lambda folder: (folder / "rank-00000.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_sends_the_run_to_the_checkpoint_before(three: Path, damage: str) -> None:
    DAMAGE[damage](three / "step-00000003.a0001")
    reader = store(three)
    found = reader.newest_whole()
    assert found is not None
    assert found.step == 2
    assert reader.passed_over == 1
    assert "step-00000003.a0001.bad" in names(three)
    assert newest(three).step == 2


def test_where_no_checkpoint_is_whole_that_is_said_and_the_run_begins_anew(
    three: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in three.glob("step-*"):
        DAMAGE["a truncated file"](folder)
    assert store(three).newest_whole() is None
    said = [record.getMessage().rpartition("; ")[2] for record in caplog.records]
    assert said == [
        "using the one before",
        "using the one before",
        "none is left, so the run starts from the beginning",
    ]


def test_a_checkpoint_that_is_damaged_again_after_it_was_put_back_is_set_aside_again(three: Path) -> None:
    for _ in range(3):
        shutil.copytree(three / "step-00000002.a0001", three / "step-00000003.a0001", dirs_exist_ok=True)
        DAMAGE["a truncated file"](three / "step-00000003.a0001")
        assert newest(three).step == 2
    assert names(three)[-3:] == [f"step-00000003.a0001.bad{number}" for number in ("", 1, 2)]


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "rank-00000.json"])
def test_a_file_that_may_not_be_read_is_not_damaged(
    three: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a copy belongs to somebody else the run must not begin anew, beside checkpoints that are whole."""
    whole = {call: getattr(LocalPlace, call) for call in ("read", "read_into")}

    def refused(call: str) -> Callable[..., Any]:
        def read(place: LocalPlace, file: str, *arguments: Any) -> Any:
            if file == name:
                raise PermissionError(13, "Permission denied", str(place.path / file))
            return whole[call](place, file, *arguments)

        return read

    for call in whole:
        monkeypatch.setattr(LocalPlace, call, refused(call))
    before = names(three)
    with pytest.raises(PermissionError):
        store(three).newest_whole()
    assert names(three) == before


def test_without_its_manifest_a_checkpoint_does_not_exist(three: Path) -> None:
    (three / "step-00000003.a0001" / "manifest.json").unlink()
    reader = store(three)
    found = reader.newest_whole()
    assert found is not None
    assert found.step == 2
    assert "step-00000003.a0001" in names(three)  # removed only once this attempt has saved
    assert save(reader, 3, State(3))
    assert "step-00000003.a0001" not in names(three)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert store(tmp_path).newest_whole() is None


def test_the_last_k_and_every_nth_are_kept(tmp_path: Path) -> None:
    writer = store(tmp_path, keep=2, keep_every_steps=4)
    for step in range(1, 11):
        assert save(writer, step, State(step))
    assert [saved.step for saved in committed(LocalPlace(tmp_path))] == [10, 9, 8, 4]
    assert (tmp_path / "latest").read_text().strip() == "step-00000010.a0001"


def test_a_whole_step_is_not_saved_again(three: Path) -> None:
    again = store(three)
    again.restore(newest(three), State(0))
    assert save(again, 3, State(99))
    assert names(three)[-1] == "step-00000003.a0001"


def test_attempts_count_up(tmp_path: Path) -> None:
    assert [store(tmp_path).attempt for _ in range(3)] == [1, 2, 3]


def test_a_copy_without_the_attempts_goes_on_counting_where_its_folders_end(three: Path) -> None:
    """Else its own checkpoints, of attempt 1, would count as older than the one that was copied."""
    store(three)
    third = store(three)
    assert save(third, 4, State(4))
    shutil.rmtree(three / "attempts")
    copied = store(three, keep=1)
    assert copied.attempt == 4
    assert save(copied, 5, State(5))
    assert names(three) == ["step-00000005.a0004"]
    assert newest(three).step == 5


def test_the_older_of_two_attempts_stops_and_harms_nothing(three: Path) -> None:
    older, newer = store(three), store(three)
    assert save(newer, 4, State(4))
    before = names(three)
    with pytest.raises(SupersededError, match="superseded by attempt 3"):
        save(older, 5, State(5))
    assert [saved.step for saved in committed(LocalPlace(three))] == [4, 3, 2]
    assert set(before) <= set(names(three))
    assert SupersededError.exit_code == 1


def test_temporary_files_of_killed_writers_are_removed_after_the_first_commit(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    store(folder)
    stale = [place / ".latest.host-1-2.tmp" for place in (folder, folder / "attempts", folder.parent)]
    for file in stale:
        file.touch()
    newer = store(folder)
    (folder / ".latest.host-3-4.tmp").touch()  # of somebody who may still write it
    assert all(file.exists() for file in stale)
    assert save(newer, 1, State(1))
    assert [file.name for file in folder.parent.rglob("*.tmp")] == [".latest.host-3-4.tmp"]


def test_what_fails_beside_a_newer_attempt_is_no_failure_of_the_run(three: Path) -> None:
    """A slow start may be reading a checkpoint that the newer one has just replaced."""
    older = store(three)
    with pytest.raises(FileNotFoundError), older.unless_superseded():
        raise FileNotFoundError("rank-00000.safetensors")
    store(three)
    with pytest.raises(SupersededError, match="superseded by attempt 3"), older.unless_superseded():
        raise FileNotFoundError("rank-00000.safetensors")


def test_what_an_older_attempt_still_commits_is_not_continued(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older rank was stopped between its check and its commit, and woke after the newer had saved."""
    older, newer = store(three), store(three)
    assert save(newer, 4, State(4))
    monkeypatch.setattr(older, "refuse_if_superseded", lambda: None)
    assert save(older, 9, State(9))
    assert (newest(three).step, newest(three).attempt) == (4, 3)


def test_files_that_a_newer_attempt_has_removed_are_not_waited_for(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of the older one hung, and woke after the newer had tidied up."""
    older = store(three, timeout_seconds=30)
    store(three)
    monkeypatch.setattr(older, "missing", lambda folder: [1])
    with pytest.raises(SupersededError, match="superseded by attempt 3"):
        save(older, 4, State(4))


@pytest.mark.parametrize("newer_saves", [False, True])
def test_what_the_newer_attempt_has_not_found_is_never_committed(
    three: Path, monkeypatch: pytest.MonkeyPatch, newer_saves: bool
) -> None:
    """The newer one begins while the older is between its check and its commit, and may die before it saves.

    Were the older one's step 4 there afterwards, a third attempt would continue it: without the lines of numbers
    that the second has removed, and whatever settings the second was started with.
    """
    older = store(three)
    check = older.refuse_if_superseded
    newer: list[CheckpointStore] = []

    def late() -> None:
        check()
        if not newer:
            newer.append(store(three))
            found = newer[0].newest_whole()
            assert found is not None
            assert (found.step, found.attempt) == (3, 1)

    monkeypatch.setattr(older, "refuse_if_superseded", late)
    with pytest.raises(SupersededError, match="superseded by attempt 3"):
        save(older, 4, State(4))
    if newer_saves:
        assert save(newer[0], 5, State(5))
        assert names(three) == ["step-00000002.a0001", "step-00000003.a0001", "step-00000005.a0003"]
    third = store(three)
    found = third.newest_whole()
    assert found is not None
    assert (found.step, found.attempt) == ((5, 3) if newer_saves else (3, 1))
    assert third.passed_over == 0


@pytest.mark.parametrize("written", [0, 100])
def test_without_hard_links_what_the_newer_attempt_has_not_found_whole_is_never_committed(
    three: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The older one hangs while it writes its manifest, which has its name by then. Nothing is overwritten."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(durable.os, "link", no_links)
    older, sync = store(three), durable.sync
    newer: list[CheckpointStore] = []

    def hanging(descriptor: int) -> None:
        sync(descriptor)
        manifest = three / "step-00000004.a0002" / "manifest.json"
        if not newer and manifest.exists():
            monkeypatch.setattr(durable, "sync", sync)
            content = manifest.read_bytes()
            os.truncate(manifest, written)
            newer.append(store(three))
            found = newer[0].newest_whole()
            assert found is not None
            assert (found.step, found.attempt) == (3, 1)
            os.pwrite(descriptor, content, 0)

    monkeypatch.setattr(durable, "sync", hanging)
    with pytest.raises(SupersededError, match="superseded by attempt 3"):
        save(older, 4, State(4))
    third = store(three)
    found = third.newest_whole()
    assert found is not None
    assert (found.step, found.attempt) == (3, 1)
    assert newer[0].passed_over == bool(written)


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path) -> None:
    writer, state = store(tmp_path), State(1)
    writer.begin_save(1, state, {})
    for fragment in state.tensors:
        fragment.data.fill_(2.0)
    assert writer.is_saving
    result = writer.finish_save()
    assert result is not None
    assert result.ok
    assert not writer.is_saving
    found = State(0)
    store(tmp_path).restore(newest(tmp_path), found)
    assert all(torch.equal(f.data, torch.ones_like(f.data)) for f in found.tensors)


def test_a_save_that_cannot_be_written_fails_and_leaves_nothing(
    three: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = store(three)
    monkeypatch.setattr("beit_dist.engine.checkpoint.writing.write_fragments", no_space)
    assert not save(writer, 4, State(4))
    assert "No space left on device" in caplog.text
    assert [saved.step for saved in committed(LocalPlace(three))] == [3, 2, 1]
    assert len(names(three)) == 3


def test_chunk_checksums_cover_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr("beit_dist.checkpoints.files.CHUNK", 1000)
    write_fragments(LocalPlace(tmp_path), 0, FileImage.of([Fragment("p", "weight", 0, torch.arange(777.0))]))
    record = json.loads((tmp_path / "rank-00000.json").read_bytes())
    content = (tmp_path / "rank-00000.safetensors").read_bytes()
    assert record["bytes"] == len(content)
    assert record["crc32"] == [zlib.crc32(content[i : i + 1000]) for i in range(0, len(content), 1000)]


def test_another_format_is_refused(three: Path) -> None:
    saved = newest(three)
    saved.manifest["format"] = 2
    with pytest.raises(CheckpointError, match="got format 2, expected 1"):
        store(three).restore(saved, State(0))
    assert len(rank_records(saved)) == 1


def test_the_copy_is_laid_out_as_the_file_and_its_memory_is_found_once_and_beforehand(tmp_path: Path) -> None:
    """The second save, and the first one that was prepared, need no memory that the system has yet to find."""

    def faults(work: Callable[[], object]) -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        work()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    state = State(1)
    state.tensors[0] = Fragment("a.weight", "weight", 0, torch.ones(2**23))  # 32 MiB: 16 huge pages, or 8,192
    image = FileImage(state.tensors)
    unprepared = faults(lambda: image.take(state.tensors))
    assert unprepared >= 16

    writer = store(tmp_path)
    writer.prepare(state, torch.device("cpu"))  # type: ignore[arg-type]
    memory = writer._image
    assert memory is not None
    assert writer._preparing is not None
    assert not writer._preparing.is_alive(), "the first step comes first"
    for _ in range(2):
        writer.find_memory()
    writer._preparing.join()
    assert faults(lambda: memory.take(state.tensors)) < unprepared / 4
    for step in (1, 2):
        assert save(writer, step, state)
        assert writer._image is memory
        written = (tmp_path / f"step-{step:08d}.a0001" / "rank-00000.safetensors").read_bytes()
        assert written == memory.bytes
    state.tensors = state.tensors[:2]
    assert save(writer, 3, state)
    restored = State(0)
    restored.tensors = [Fragment(f.parameter, f.role, f.start, torch.zeros(f.length)) for f in state.tensors]
    store(tmp_path).restore(newest(tmp_path), restored)
    assert torch.equal(restored.tensors[0].data, state.tensors[0].data)


@pytest.mark.parametrize("urgent", [False, True])
def test_writing_gives_way_to_training_unless_nothing_goes_on_beside(
    tmp_path: Path, urgent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    seen = []
    write = write_fragments

    def watched(*arguments: Any) -> None:
        seen.append(nice())
        write(*arguments)

    monkeypatch.setattr("beit_dist.engine.checkpoint.writing.write_fragments", watched)
    before, writer = nice(), store(tmp_path)
    writer.begin_save(1, State(1), {}, urgent=urgent)  # type: ignore[arg-type]
    writer.finish_save()
    assert seen == [before if urgent else min(19, before + 10)]
    assert nice() == before
