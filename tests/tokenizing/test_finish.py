"""Finishing: nothing becomes a data set unless all of it is there and of one job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit_dist.errors import ConfigError, DataError
from beit_dist.shards.manifest import Manifest
from beit_dist.shards.statistics import STATISTICS_NAME, Statistics, Tally, load_statistics
from beit_dist.storage.local import LocalPlace
from beit_dist.tokenizing.finish import finished
from beit_dist.tokenizing.rejected import rejection_limit


def test_missing_and_damaged_shards_are_named_with_the_workers_that_make_them(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.work(out, 0, 3)
    with pytest.raises(DataError, match=r"2 of 4 shards are not committed: 1, 2\. .*--index 0 --count 1\."):
        bench.finish(out)
    with pytest.raises(DataError, match=r"Of 3 workers, these make them: 1-2\. .*--count 3, .*--array=1-2;"):
        bench.finish(out, workers=3)
    assert not (out / "manifest.json").exists()
    (out / "v01/shard-000003.tar").unlink()
    with pytest.raises(DataError, match=r"Of 3 workers, these make them: 0-2\."):
        bench.finish(out, workers=3)
    for index in (1, 2):
        bench.work(out, index, 3)
    with pytest.raises(
        DataError, match=r"shard-000003\.tar: got no such file, .*these make them: 0\. .*--array=0;"
    ):
        bench.finish(out, workers=3)
    bench.work(out, 0, 3)
    bench.finish(out, workers=3)


def test_one_worker_makes_what_others_left_out(
    bench: Any, tmp_path: Path, read_content: Callable[[Path], dict[str, str]]
) -> None:
    out = tmp_path / "out"
    bench.work(out, 1, 3)
    assert bench.work(out, 0, 1).kept == 1
    bench.finish(out)
    assert read_content(out) == read_content(bench.run("alone"))


def test_nothing_started_is_refused(tmp_path: Path, bench: Any) -> None:
    with pytest.raises(DataError, match="no worker has started"):
        bench.finish(tmp_path)


def test_a_list_that_changed_is_refused(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.work(out)
    lines = (out / "sources.jsonl").read_bytes().splitlines(keepends=True)
    (out / "sources.jsonl").write_bytes(b"".join([lines[0], *reversed(lines[1:])]))
    with pytest.raises(DataError, match="changed since the job began"):
        bench.finish(out)


def test_shards_of_no_list_are_refused(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.work(out)
    (out / "v02").mkdir()
    (out / "v02/shard-000000.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"shards that are on no list: v02/shard-000000\.tar"):
        bench.finish(out)


def test_settings_that_differ_from_the_job_are_refused(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.work(out)
    with pytest.raises(DataError, match="views: got 4, expected 2"):
        bench.finish(out, {"views": 4, "seed": None})
    assert bench.finish(out, {"views": 2, "seed": None}).views == 2


def test_too_many_rejects_fail_the_finish(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = bench.images / "class-0/000.png"
    path.write_bytes(b"?")
    bench.work(out)
    with pytest.raises(DataError, match="1 images rejected, more than the 0"):
        bench.finish(out, max_rejected="0")
    assert not (out / "manifest.json").exists()
    bench.finish(out, max_rejected="1")


def test_a_job_that_rejected_everything_is_no_data_set(bench: Any, tmp_path: Path) -> None:
    for path in bench.images.rglob("*.png"):
        path.write_bytes(b"?")
    bench.work(tmp_path / "out")
    with pytest.raises(DataError, match="every image was rejected"):
        bench.finish(tmp_path / "out")


def test_finished_knows_its_own_data_set_and_refuses_another(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finished(LocalPlace(out), {}) is None
    bench.run("out")
    assert finished(LocalPlace(out), {"views": 2}) is not None
    with pytest.raises(DataError, match="another job"):
        finished(LocalPlace(out), {"views": 3})
    (out / "v00/shard-000000.tar").unlink()
    assert finished(LocalPlace(out), {"views": 2}) is None
    (out / "job.json").unlink()
    with pytest.raises(DataError, match="Use another"):
        finished(LocalPlace(out), {"views": 2})


@pytest.mark.parametrize(
    ("text", "limit"), [("0", 0), ("7", 7), ("1%", 10), ("0.25%", 2), ("0.7%", 7), ("100%", 1000), ("5000", 1000)]
)
def test_the_limit_is_a_number_or_a_percentage(text: str, limit: int) -> None:
    assert rejection_limit(text, 1000) == limit


@pytest.mark.parametrize("text", ["", "%", "-1", "a", "1.5", "nan%", "-2%"])
def test_another_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-rejected"):
        rejection_limit(text, 1000)


def counted(out: Path, manifest: Manifest) -> Tally:
    """The samples' tokens and patches as the shards have them, counted here."""
    tally, layout = Tally.empty(manifest.layout), manifest.layout
    for shard in manifest.shards:
        raw = (out / shard.name).read_bytes()
        for start in range(0, shard.samples * layout.stride, layout.stride):
            tokens = np.frombuffer(raw, "<i2", layout.patches, start + layout.tokens_start)
            patches = np.frombuffer(raw, np.uint8, layout.patches_nbytes, start + layout.patches_start)
            tally.add(tokens, patches.reshape(layout.patches, -1))
    return tally


def test_the_statistics_count_every_sample_whoever_made_it(bench: Any, tmp_path: Path) -> None:
    (bench.images / "class-0/000.png").write_bytes(b"no image")
    out = tmp_path / "out"
    bench.work(out, 0, 2)
    for index in (1, 0):  # the first again: it keeps what it has made
        bench.work(out, index, 2)
    manifest = bench.finish(out)
    assert load_statistics(str(out), manifest) == Statistics(counted(out, manifest), whole=True)
    assert counted(out, manifest).samples == 12 * 2
    alone = bench.run("alone")
    assert (alone / STATISTICS_NAME).read_bytes() == (out / STATISTICS_NAME).read_bytes()


def test_there_are_no_statistics_where_a_commit_has_no_counts(
    bench: Any, tmp_path: Path, read_content: Callable[[Path], dict[str, str]]
) -> None:
    out = tmp_path / "out"
    bench.work(out)
    path = out / "commits/shard-000001.json"
    fields = json.loads(path.read_text())
    del fields["tally"]
    path.write_text(json.dumps(fields))
    bench.finish(out)
    assert not (out / STATISTICS_NAME).exists()
    assert read_content(out) == read_content(bench.run("counted"))


def test_counts_that_contradict_one_another_are_named_with_their_commit(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.work(out)
    path = out / "commits/shard-000001.json"
    fields = json.loads(path.read_text())
    fields["tally"]["samples"] += 1
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"shard-000001\.json: cannot be read .*Remove it"):
        bench.finish(out)


def test_the_manifest_is_written_after_the_statistics(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    bench.work(out)
    written, write = list[str](), LocalPlace.write

    def note(self: LocalPlace, name: str, content: bytes) -> None:
        written.append(name)
        write(self, name, content)

    monkeypatch.setattr(LocalPlace, "write", note)
    bench.finish(out)
    assert written == [STATISTICS_NAME, "manifest.json"]
