"""The split: held-out images come from the same list, no image is on both sides, and all workers agree on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.errors import ConfigError, DataError
from beit_dist.shards.manifest import HELD_OUT_NAME, Manifest, load_held_out, load_manifest
from beit_dist.shards.sample import JSON_BYTES
from beit_dist.shards.statistics import load_statistics
from beit_dist.shards.verification import verify_with_held_out
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.tokenizing.finish import finished
from beit_dist.tokenizing.parts import held_out_images

Read = Callable[[Path], dict[str, str]]


def notes(folder: Path) -> list[dict[str, Any]]:
    """The json of every sample of view 0."""
    manifest, found = load_manifest(str(folder)), []
    for shard in manifest.view_shards(0):
        raw = (folder / shard.name).read_bytes()
        for row in range(shard.samples):
            start = row * manifest.layout.stride + manifest.layout.json_start
            found.append(json.loads(raw[start : start + JSON_BYTES]))
    return found


def ids(folder: Path) -> list[int]:
    return [int(note["key"][4:]) for note in notes(folder)]


def everything(out: Path, read_content: Read) -> dict[str, dict[str, str]]:
    return {"": read_content(out), HELD_OUT_NAME: read_content(out / HELD_OUT_NAME)}


def test_both_data_sets_come_from_one_list_and_share_no_image(bench: Any) -> None:
    out = bench.run("out", held_out="3")
    assert ids(out) == list(range(10))
    assert ids(out / HELD_OUT_NAME) == [10, 11, 12]
    sources = [[note["source"] for note in notes(folder)] for folder in (out, out / HELD_OUT_NAME)]
    assert sources[0] + sources[1] == [note["source"] for note in notes(bench.run("whole"))]
    manifest, held_out = load_manifest(str(out)), load_held_out(str(out))
    assert held_out is not None
    assert (manifest.views, held_out.views) == (2, 1)
    assert manifest.layout == held_out.layout
    assert not list(verify_with_held_out(LocalPlace(out), manifest, held_out, 1, lambda _: None, []))


def test_held_out_images_are_made_like_those_that_are_trained_on(bench: Any) -> None:
    """Or their tokens would have other frequencies, and no number of theirs could be compared."""
    out = bench.run("out", held_out="3")
    first_views = {note["source"]: note for note in notes(bench.run("whole"))}
    for note in notes(out / HELD_OUT_NAME):
        assert note == first_views[note["source"]]


def test_full_shards_are_the_same_with_and_without_a_split_and_the_list_without_is_as_it_was(
    bench: Any, read_content: Read
) -> None:
    whole, split, none = bench.run("whole"), bench.run("split", held_out="3"), bench.run("none", held_out="0")
    assert read_content(whole) == read_content(none)
    for name in ("v00/shard-000000.tar", "v01/shard-000001.tar"):
        assert read_content(whole)[name] == read_content(split)[name]
    header = (whole / "sources.jsonl").read_text().splitlines()[0]
    assert header == (
        '{"format": "beit_dist sources", "version": 1, "sources": [["folder", "' + str(bench.images) + '"]], '
        '"seed": 0, "entries": 13, "labels": true, "sniff": false}'
    )
    assert not (whole / HELD_OUT_NAME).exists()
    assert not (none / HELD_OUT_NAME).exists()
    assert (whole / "sources.jsonl").read_bytes() == (none / "sources.jsonl").read_bytes()


@pytest.mark.parametrize("index_order", [(2, 0, 1), (0, 1, 2)])
def test_several_workers_write_the_same_two_data_sets(
    bench: Any, tmp_path: Path, read_content: Read, index_order: tuple[int, ...]
) -> None:
    out = tmp_path / "three"
    for index in index_order:
        bench.work(out, index, 3, held_out="5", shard_samples=2)
    bench.finish(out)
    alone = bench.run("alone", held_out="5", shard_samples=2)
    assert everything(out, read_content) == everything(alone, read_content)
    for folder in (out, out / HELD_OUT_NAME):
        statistics = load_statistics(str(folder), load_manifest(str(folder)))
        assert statistics is not None
        assert statistics.whole


def test_a_worker_that_is_not_told_of_the_split_finds_it_in_the_list(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.job(out, held_out="20%")
    assert bench.work(out).images == 13
    bench.finish(out)
    assert len(ids(out / HELD_OUT_NAME)) == 3


def test_another_split_than_that_of_the_list_is_refused(bench: Any, tmp_path: Path) -> None:
    bench.job(tmp_path / "with", held_out="3")
    bench.job(tmp_path / "with", held_out="20%")  # the same, said otherwise
    with pytest.raises(ConfigError, match=r"--held-out: got '4', expected 3 of 13 images\. Give the same as when"):
        bench.job(tmp_path / "with", held_out="4")
    with pytest.raises(ConfigError, match=r"--held-out: got '0', expected 3 of 13"):
        bench.job(tmp_path / "with", held_out="0")
    bench.job(tmp_path / "without")
    with pytest.raises(ConfigError, match=r"--held-out: got '3', expected 0 of 13 images.*start over"):
        bench.job(tmp_path / "without", held_out="3")


@pytest.mark.parametrize(
    ("text", "entries", "held_out"),
    [
        (None, 13, 0),
        ("0", 13, 0),
        ("0%", 13, 0),
        ("5", 13, 5),
        ("12", 13, 12),
        ("2%", 750, 15),
        ("2%", 751, 16),
        ("2%", 13, 1),
        ("0.1%", 1000, 1),
        ("29%", 100, 29),  # 0.29 · 100 is 28.999... in floats
    ],
)
def test_a_percentage_is_rounded_up(text: str | None, entries: int, held_out: int) -> None:
    assert held_out_images(text, entries) == held_out


@pytest.mark.parametrize("text", ["-1", "2.5", "2 %", "some", "", "%", "1e3", "9" * 5000, "٣"])
def test_what_is_no_number_of_images_is_refused_before_anything_is_listed(
    bench: Any, tmp_path: Path, text: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"--held-out: .*expected a number of images, or a percentage such as 2%"
    ):
        bench.job(tmp_path / "out", held_out=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["13", "100%", "99%", "50"])
def test_one_image_at_least_is_left_to_train_on(bench: Any, tmp_path: Path, text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"fewer than all images, of which there are 13\. At least one must be left"
    ):
        bench.job(tmp_path / "out", held_out=text)
    assert not (tmp_path / "out/sources.jsonl").exists()


def test_the_held_out_manifest_is_written_before_the_main_one(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    bench.work(out, held_out="3")
    written, write = list[str](), LocalPlace.write

    def note(self: LocalPlace, name: str, content: bytes) -> None:
        written.append(str((self / name).path.relative_to(out)))
        write(self, name, content)

    monkeypatch.setattr(LocalPlace, "write", note)
    bench.finish(out)
    assert written == [
        "held-out/statistics.json",
        "held-out/manifest.json",
        "statistics.json",
        "manifest.json",
    ]


def test_nothing_is_finished_before_both_parts_are_whole(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.work(out, held_out="3")
    (out / "held-out/commits/shard-000000.json").unlink()
    with pytest.raises(DataError, match=r"out/held-out: 1 of 1 shards are not committed: 0\. "):
        bench.finish(out)
    bench.work(out)
    (out / "commits/shard-000002.json").unlink()
    with pytest.raises(DataError, match=r"out: 1 of 3 shards are not committed: 2\. "):
        bench.finish(out)
    assert not (out / "held-out/manifest.json").exists()


@pytest.mark.parametrize("lost", ["held-out/manifest.json", "held-out/v00/shard-000000.tar"])
def test_a_data_set_without_its_held_out_images_is_not_complete_and_is_mended(
    bench: Any, read_content: Read, lost: str
) -> None:
    out = bench.run("out", held_out="3")
    before = everything(out, read_content)
    assert finished(LocalPlace(out), {}) == load_manifest(str(out))
    (out / lost).unlink()
    assert finished(LocalPlace(out), {}) is None
    bench.work(out)
    bench.finish(out)
    assert everything(out, read_content) == before


def test_a_killed_worker_goes_on_in_either_part(bench: Any, tmp_path: Path, read_content: Read) -> None:
    class KilledError(Exception):
        pass

    whole = everything(bench.run("whole", held_out="5", shard_samples=2), read_content)
    original, out = bench.encoder, tmp_path / "out"
    for batches in (1, 3, 4):  # encoded before it dies: 1 of 3 shards held out, all of them, one to train on
        left = [batches]

        def dies(images: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return original(images)

        bench.encoder = dies
        with pytest.raises(KilledError):
            bench.work(out, held_out="5", shard_samples=2)
    bench.encoder = original
    assert bench.work(out, shard_samples=2).kept > 1
    bench.finish(out)
    assert everything(out, read_content) == whole


def damage(bench: Any, out: Path, wanted: range) -> None:
    """Make the images with these ids unusable."""
    bench.job(out, held_out="3")
    for number, line in enumerate((out / "sources.jsonl").read_text().splitlines()[1:]):
        if number in wanted:
            path = bench.images / json.loads(line)["name"]
            path.write_bytes(b"?" * path.stat().st_size)


def test_rejected_images_of_both_parts_count_together(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    damage(bench, out, range(9, 12))  # one to train on, two held out
    with pytest.raises(DataError, match="3 images rejected, more than the 2 that"):
        bench.work(out, max_rejected=2)
    assert len(bench.work(out, max_rejected=3).rejected) == 3
    with pytest.raises(DataError, match="3 images rejected, more than the 2 that"):
        bench.finish(out, max_rejected="2")
    assert bench.finish(out, max_rejected="3").rejected == 1
    held_out = load_held_out(str(out))
    assert held_out is not None
    assert (held_out.rejected, held_out.samples) == (2, 1)


def test_held_out_images_that_are_all_rejected_are_named(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    damage(bench, out, range(10, 13))
    bench.work(out)
    with pytest.raises(DataError, match=r"held-out: every image was rejected, .*start over with more --held-out"):
        bench.finish(out)


def test_both_data_sets_may_be_in_a_store(bench: Any, read_content: Read) -> None:
    place = open_place("memory://held-out-test/out")
    bench.work(str(place), held_out="3")
    bench.finish(str(place))
    local = bench.run("local", held_out="3")
    found: Manifest | None = load_held_out(place)
    assert found == load_held_out(str(local))
    assert load_manifest(place) == load_manifest(str(local))


def test_a_list_whose_split_leaves_nothing_is_refused(bench: Any, tmp_path: Path) -> None:
    bench.job(tmp_path, held_out="3")
    path = tmp_path / "sources.jsonl"
    for wrong in ("13", "-1"):
        path.write_text(path.read_text().replace('"held_out": 3', f'"held_out": {wrong}'))
        with pytest.raises(DataError, match="header is incomplete"):
            bench.job(tmp_path)
        path.write_text(path.read_text().replace(f'"held_out": {wrong}', '"held_out": 3'))
