"""Workers: the same bytes whatever their number, after any interruption, and never two jobs in one folder."""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit_dist.errors import ConfigError, DataError, SampleError, SpaceError
from beit_dist.shards.manifest import load_manifest
from beit_dist.shards.sample import parse_key
from beit_dist.storage import durable
from beit_dist.storage.durable import TEMPORARY
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing import worker as worker_module
from beit_dist.tokenizing.commits import read_commit
from beit_dist.tokenizing.decoding import Decoders, Recipe
from beit_dist.tokenizing.sources import SourceList

Read = Callable[[Path], dict[str, str]]


def keys(out: Path, view: int = 0) -> list[str]:
    found = []
    for shard in load_manifest(str(out)).view_shards(view):
        with tarfile.open(out / shard.name) as tar:
            found += [name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")]
    return found


def test_one_and_three_workers_write_the_same_bytes(bench: Any, tmp_path: Path, read_content: Read) -> None:
    one = bench.run("one")
    three = tmp_path / "three"
    for index in (2, 0, 1):
        bench.work(three, index, 3)
    bench.finish(three)
    assert read_content(one) == read_content(three)
    assert len(read_content(one)) == 2 * 4 + 2


def test_decoding_processes_change_nothing(bench: Any, read_content: Read) -> None:
    assert read_content(bench.run("in-process")) == read_content(bench.run("pool", decoders=2))


def test_a_folder_and_its_tar_give_the_same_samples(
    bench: Any, tmp_path: Path, read_content: Read, pack_tar: Callable[[Path, Path], None]
) -> None:
    pack_tar(bench.images, tmp_path / "images.tar")
    from_tar = bench.run("from-tar", source=str(tmp_path / "images.tar"))
    assert read_content(bench.run("from-folder")) == read_content(from_tar)


def test_shard_s_holds_its_slice_of_the_list_in_every_view(bench: Any) -> None:
    out = bench.run("out")
    ids = [parse_key(key) for key in keys(out, 0)]
    assert ids == [(0, number) for number in range(13)]
    assert [parse_key(key) for key in keys(out, 1)] == [(1, number) for number in range(13)]
    assert [shard.samples for shard in load_manifest(str(out)).view_shards(1)] == [4, 4, 4, 1]


def test_samples_tell_where_they_come_from(bench: Any) -> None:
    out = bench.run("out")
    entries = {entry.sample_id: entry for entry in SourceList(LocalPlace(out), 99).read(0)}
    with tarfile.open(out / "v01/shard-000001.tar") as tar:
        for name in tar.getnames()[::3]:
            notes = json.loads(tar.extractfile(name).read())  # type: ignore[union-attr]
            entry = entries[parse_key(notes["key"])[1]]
            assert (notes["source"], notes["label"]) == (entry.name, entry.label)
            left, top, right, bottom = notes["box"]
            assert 0 <= left < right <= 28 + 12
            assert 0 <= top < bottom <= 24
            assert isinstance(notes["flip"], bool)


def test_the_encoder_sees_one_padded_shape(bench: Any) -> None:
    bench.run("out")
    assert bench.seen_shapes == {(3, 32, 32, 3)}  # shards of 4 in batches of 3: one full, one of 1 padded


def test_tokens_belong_to_their_image(bench: Any) -> None:
    """The stand-in's tokens are block means, which the patches of the same crop show too."""
    out = bench.run("out", augment="center", views=1)
    with tarfile.open(out / "v00/shard-000002.tar") as tar:
        for row in range(4):
            patches, tokens = (
                np.frombuffer(tar.extractfile(tar.getnames()[3 * row + part]).read()[128:], kind)  # type: ignore[union-attr]
                for part, kind in ((1, np.uint8), (2, np.dtype("<i2")))
            )
            means = patches.reshape(16, -1).mean(axis=1)
            assert np.corrcoef(means, tokens)[0, 1] > 0.98


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


@pytest.mark.parametrize("moment", ["in the middle of a shard", "between rename and commit", "between two views"])
def test_a_killed_worker_redoes_only_what_is_not_committed(
    bench: Any, tmp_path: Path, read_content: Read, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = bench.run("whole")
    out = tmp_path / "out"
    calls = 0

    def killed_at(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return original(*arguments)

        return step

    with monkeypatch.context() as patch:
        if moment == "in the middle of a shard":
            bench.encoder = killed_at(7, bench.encoder)  # 4 encoder batches a shard
        elif moment == "between rename and commit":
            patch.setattr(worker_module, "write_commit", killed_at(2, worker_module.write_commit))
        else:
            killed = killed_at(4, durable.publish)
            original = durable.publish
            patch.setattr(
                durable, "publish", lambda old, path: (killed if path.suffix == ".tar" else original)(old, path)
            )
        with pytest.raises(Killed):
            bench.work(out)
    first = (out / "v00/shard-000000.tar").stat().st_mtime_ns
    assert read_commit(LocalPlace(out), 0) is not None
    assert read_commit(LocalPlace(out), 1) is None
    committed = sum(read_commit(LocalPlace(out), shard) is not None for shard in range(4))
    report = bench.work(out)
    assert (report.made, report.kept) == (4 - committed, committed)
    assert (out / "v00/shard-000000.tar").stat().st_mtime_ns == first
    bench.finish(out)
    assert read_content(out) == read_content(whole)


def test_leftovers_of_a_killed_worker_are_no_shards_and_are_removed(
    bench: Any, tmp_path: Path, read_content: Read
) -> None:
    out = tmp_path / "out"
    for folder, name in (
        ("v00", "shard-000001.tar"),
        ("v01", "shard-000003.tar"),
        ("commits", "shard-000002.json"),
    ):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / f".{name}.elsewhere-77{TEMPORARY}").write_bytes(b"half")
    bench.work(out)
    bench.finish(out)
    assert not list(out.rglob(f"*{TEMPORARY}"))
    assert read_content(out) == read_content(bench.run("other"))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_committed_shard_of_another_size_is_made_again(
    bench: Any, tmp_path: Path, read_content: Read, damage: str
) -> None:
    out = bench.run("out")
    before = read_content(out)
    path = out / "v01/shard-000001.tar"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"v01/shard-000001\.tar"):
        bench.finish(out)
    assert bench.work(out)[:2] == (1, 3)
    bench.finish(out)
    assert read_content(out) == before


def test_two_workers_on_one_shard_do_not_mix_their_files(
    bench: Any, tmp_path: Path, read_content: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second removes the first's temporary files, which then cannot be published."""
    out = tmp_path / "out"
    first = out / "v00"
    honest, started = bench.encoder, False

    def meanwhile_another(images: Any) -> Any:
        nonlocal started
        if not started:
            started = True
            bench.encoder = honest
            while not list(first.glob(f".*{TEMPORARY}")):
                time.sleep(0.01)
            monkeypatch.setattr(durable, "temporary_path", lambda p: p.with_name(f".{p.name}.other-1{TEMPORARY}"))
            bench.work(out)
            monkeypatch.undo()
        return honest(images)

    bench.encoder = meanwhile_another
    with pytest.raises(SampleError, match="another worker with the same index"):
        bench.work(out)
    bench.finish(out)
    bench.encoder = honest
    assert read_content(out) == read_content(bench.run("other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "b" * 64}, "tokenizer: got 'bbbb"),
        ({"shard_samples": 5}, "shard_samples: got 5, expected 4"),
        ({"views": 1}, "views: got 1, expected 2"),
        ({"precision": "bf16"}, "precision"),
        ({"device": "cuda"}, "device"),
        ({"torch": "2.1"}, "begun with other software: torch: got '2.1', expected '2.0'.*one environment"),
        ({"pillow": "10.0"}, "begun with other software: pillow: got '10.0', expected '11.0'"),
        ({"numpy": "2.0"}, "begun with other software: numpy: got '2.0', expected '1.26'"),
    ],
)
def test_a_folder_of_another_job_is_refused(bench: Any, tmp_path: Path, changes: Any, message: str) -> None:
    out = tmp_path / "out"
    bench.work(out, 0, 3)
    with pytest.raises(DataError, match=message):
        bench.work(out, 1, 3, **changes)


def test_commits_of_another_job_are_refused(bench: Any, tmp_path: Path) -> None:
    other, out = bench.run("other", tokenizer="b" * 64), tmp_path / "out"
    bench.job(out)
    shutil.copytree(other / "commits", out / "commits")
    for view in ("v00", "v01"):
        shutil.copytree(other / view, out / view)
    with pytest.raises(DataError, match=r"commits/shard-000000\.json: made with other"):
        bench.work(out)
    with pytest.raises(DataError, match=r"commits/shard-000000\.json: made with other"):
        bench.finish(out)


def test_a_damaged_commit_names_the_way_out(bench: Any) -> None:
    out = bench.run("out")
    (out / "commits/shard-000001.json").write_text("{")
    with pytest.raises(DataError, match="Remove it: its shard is then made again"):
        bench.work(out)


def spoil(bench: Any, out: Path, *rows: int) -> None:
    """Make images of the frozen list undecodable, of the same size."""
    bench.job(out)
    for entry in SourceList(LocalPlace(out), 99).read(0):
        if entry.sample_id in rows:
            Path(entry.place).write_bytes(b"?" * entry.entry.size)


def test_a_rejected_image_is_missing_in_all_views_and_leaves_a_gap(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(bench, out, 2, 7)
    report = bench.work(out)
    manifest = bench.finish(out)
    assert (len(report.rejected), manifest.rejected, manifest.samples) == (2, 2, 11)
    for view in (0, 1):
        ids = [parse_key(key)[1] for key in keys(out, view)]
        assert ids == [number for number in range(13) if number not in (2, 7)]
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        (2, "not an image that Pillow reads"),
        (7, "not an image that Pillow reads"),
    ]
    assert all(line["name"].startswith("class-") for line in lines)


def test_a_shard_without_samples_leaves_no_file_and_is_not_in_the_manifest(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(bench, out, 4, 5, 6, 7)
    bench.work(out)
    manifest = bench.finish(out)
    assert not (out / "v00/shard-000001.tar").exists()
    assert [shard.name for shard in manifest.view_shards(0)] == [
        "v00/shard-000000.tar",
        "v00/shard-000002.tar",
        "v00/shard-000003.tar",
    ]
    assert bench.work(out).kept == 4


def test_too_many_rejects_stop_the_worker_and_finished_shards_are_kept(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(bench, out, 0, 5, 6)
    with pytest.raises(DataError, match=r"3 images rejected, more than the 2 .*\n.*not an image"):
        bench.work(out, max_rejected=2)
    assert read_commit(LocalPlace(out), 1) is not None
    assert bench.work(out, max_rejected=3)[:2] == (2, 2)


def test_an_image_that_changed_since_the_freeze_is_no_reject(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.job(out)
    entry = SourceList(LocalPlace(out), 99).read(0)[3]
    Path(entry.place).write_bytes(b"?")
    with pytest.raises(DataError, match="changed since"):
        bench.work(out, decoders=1)
    assert not list(out.rglob(f"*{TEMPORARY}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 0}, "--views"),
        ({"views": 101}, "--views"),
        ({"views": 2, "augment": "center"}, "every view is the same"),
        ({"shard_samples": 0}, "--shard-samples"),
        ({"batch": 0}, "--batch"),
        ({"seed": -1}, "seed"),
        ({"patch_size": 7}, "patch_size"),
    ],
)
def test_settings_out_of_range_are_refused(bench: Any, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        bench.work(tmp_path / "out", **changes)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * (3 * 30_720 + 10_240)  # shards of 4, 4, 4 and 1 at a stride of 6,656 bytes, in two views
    usage = worker_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(worker_module.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(SpaceError, match=r"free space, expected 0\.2 MB .*4 shards × 2 views"):
        bench.work(tmp_path / "out")
    monkeypatch.setattr(worker_module.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert bench.work(tmp_path / "out").made == 4


def test_decoded_images_keep_their_order(bench: Any, tmp_path: Path) -> None:
    bench.job(tmp_path / "out")
    sources = SourceList(LocalPlace(tmp_path / "out"), 99).read(0) * 5
    with Decoders(Recipe(1, 16, 16, 8, "random", 0), 2) as decoders:
        decoded = list(decoders.decode(sources))
    assert [one.listed for one in decoded] == sources
