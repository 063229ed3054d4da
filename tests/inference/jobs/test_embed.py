"""``beit embed`` gives the same file whatever the ranks, however often it was killed, and with broken images."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.archives import IMAGES, parquet_of, rows_of
from support.forked import Forked
from support.mixed_images import ODD, REASONS, Mixed, write_mixed
from support.together import together

from beit_dist.commands.embed import job_of, main, parser
from beit_dist.errors import ConfigError, DataError, SpaceError
from beit_dist.images.decoding import decode
from beit_dist.images.sources.folder import Folder
from beit_dist.inference import estimate as estimates
from beit_dist.inference import job as jobs
from beit_dist.inference.loading import load
from beit_dist.probing import room
from beit_dist.storage import durable

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'beit_dist[parquet]'")

CPU = torch.device("cpu")
DYING = Path(__file__).parents[2] / "support" / "dying.py"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_LEAST", 8)
    monkeypatch.setattr(jobs, "_MOST", 8)


def words(run: Path, mixed: Mixed, out: Path, *more: str) -> list[str]:
    return [str(run), "--images", *mixed.sources, "--out", str(out), "--device", "cpu", "--batch", "3", *more]


def as_rank(command: Sequence[str], seen: list[int], agreement: Any) -> int:
    """Do the command's job as one of the ranks; ``seen`` gets how many images it has looked at."""
    return job_of(parser().parse(command)).run(agreement, CPU, seen.append)


def unreadable(out: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO((out.parent / f"{out.name}.unreadable.csv").read_text(), newline="")))


def test_rows_are_in_the_sources_order_with_the_features_of_their_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = write_mixed(tmp_path / "images", parquet_of(rows_of(IMAGES), names=["x", "y", "z"]))
    out = tmp_path / "new" / "f.parquet"
    assert main(words(run, mixed, out, "--layers", "all", "--token", "both")) == 0
    table = parquet.read_table(out)
    rows = [
        (mixed.sources[3], f"rows.parquet/{n:06d}", "xyz"[int(name[6])], raw)
        for n, (name, raw) in enumerate(IMAGES.items())
    ]
    expected = [*mixed.good, *rows]
    for place, column in enumerate(("source", "name", "label")):
        assert table[column].to_pylist() == [row[place] for row in expected]
    assert ODD in table["name"].to_pylist()
    assert table.schema.names[3:] == ["mean_1", "class_1", "mean_2", "class_2"]
    features = load(run).features([decode(row[3]) for row in expected], layers=[1, 2])
    for layer in (1, 2):
        for kind, values in (("mean", features[layer].patch_mean), ("class", features[layer].class_token)):
            found = np.stack(table[f"{kind}_{layer}"].to_numpy())
            torch.testing.assert_close(torch.from_numpy(found), values, rtol=1e-4, atol=1e-5)
    lost = unreadable(out)
    assert [tuple(row[:2]) for row in lost[1:]] == mixed.bad
    assert all(row[2].startswith(reason) for row, reason in zip(lost[1:], REASONS, strict=True))
    shown = capsys.readouterr().out
    assert f"wrote   {out}: 46 rows" in shown
    assert "3 images cannot be read" in shown
    assert [path.name for path in sorted(out.parent.iterdir())] == ["f.parquet", "f.parquet.unreadable.csv"]


def test_the_file_tells_what_it_was_made_of(run: Path, mixed: Mixed, tmp_path: Path) -> None:
    for suffix in ("parquet", "npz"):
        main(words(run, mixed, tmp_path / f"f.{suffix}"))
    found = np.load(tmp_path / "f.npz", allow_pickle=False)
    table = parquet.read_table(tmp_path / "f.parquet")
    assert json.loads(str(found["beit_dist"])) == json.loads(table.schema.metadata[b"beit_dist"])
    assert sorted(found) == sorted([*table.schema.names, "beit_dist"])
    assert found["mean_1"].dtype == np.float32
    np.testing.assert_array_equal(found["mean_1"], np.stack(table["mean_1"].to_numpy()))
    for column in ("source", "name", "label"):
        assert found[column].tolist() == table[column].to_pylist()
    metadata, model = json.loads(str(found["beit_dist"])), load(run)
    assert metadata["model"] == model.provenance.name
    assert (metadata["images"], metadata["unreadable"]) == (39, 3)
    facts = metadata["facts"]
    assert facts["weights"] == model.provenance.digest
    assert (facts["layers"], facts["token"], facts["model"]["pixel_mean"]) == ([1], "mean", [0.5, 0.5, 0.5])


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_ranks_and_threads_change_no_byte(run: Path, mixed: Mixed, tmp_path: Path, suffix: str) -> None:
    alone = tmp_path / f"alone.{suffix}"
    main(words(run, mixed, alone))
    for world in (2, 3):
        out, seen = tmp_path / f"{world}.{suffix}", list[int]()
        command = words(run, mixed, out, "--workers", str(world + 2))
        assert together(world, partial(as_rank, command, seen)) == [3] * world
        assert sum(seen) == 42
        assert out.read_bytes() == alone.read_bytes()


def killed(command: Sequence[str], at: int, folder: Path) -> bool:
    """Whether the command was killed when it had given a file its name for the ``at``-th time, or just before.

    Else it has come to its end first.
    """
    when = "after" if at % 2 else "before"
    process = Forked([str(DYING), str(at), when, "embed", *command], os.environ, folder)
    process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


@pytest.mark.parametrize(("suffix", "first"), [("npz", 1), ("parquet", 9)])
def test_a_job_killed_at_any_moment_and_started_again_gives_the_same_file(
    run: Path, mixed: Mixed, tmp_path: Path, suffix: str, first: int
) -> None:
    whole = tmp_path / f"whole.{suffix}"
    main(words(run, mixed, whole))
    for at in range(first, 99):
        folder = tmp_path / str(at)
        out = folder / f"f.{suffix}"
        if not killed(words(run, mixed, out), at, tmp_path):
            break
        left = 0 if out.exists() else 42 - min(42, 8 * len(list(folder.rglob("*.f32"))))
        seen: list[int] = []
        assert together(1, partial(as_rank, words(run, mixed, out), seen)) == [3]
        assert sum(seen) == left  # what was finished is not made again
        assert out.read_bytes() == whole.read_bytes()
        assert unreadable(out) == unreadable(whole)
        names = {path.name for path in folder.iterdir() if path.suffix != durable.TEMPORARY}
        assert names == {out.name, f"{out.name}.unreadable.csv"}
    assert at == 12  # job.json, six parts, the reasons of two, the list of the unreadable, the file


def test_a_file_of_another_job_is_refused_and_that_of_the_same_is_left_alone(
    run: Path, mixed: Mixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.parquet"
    main(words(run, mixed, out))
    before = out.stat().st_mtime_ns
    assert main(words(run, mixed, out)) == 0
    assert out.stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert "nothing is left to do" in shown
    assert shown.count("wrote  ") == 1
    fewer = mixed._replace(sources=mixed.sources[:1])
    for command, said in (
        (words(run, mixed, out, "--layers", "2"), "that one holds features of other layers"),
        (words(run, mixed, out, "--token", "class"), "that one holds features of other token"),
        (words(run, fewer, out), "that one holds features of other images. Remove it, or name another --out"),
    ):
        with pytest.raises(ConfigError, match=said):
            main(command)
    for name, content in (("x.parquet", b"mine"), ("x.npz", b"mine")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="this one is there, and is not of this command"):
            main(words(run, mixed, tmp_path / name))
        assert (tmp_path / name).read_bytes() == content


def test_a_job_that_was_begun_is_not_continued_with_others(run: Path, mixed: Mixed, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    assert killed(words(run, mixed, out), 5, tmp_path)
    with pytest.raises(
        ConfigError, match=r"was begun, in f.npz.parts, of other layers. .* or remove .*f.npz.parts"
    ):
        main(words(run, mixed, out, "--layers", "2"))
    assert main(words(run, mixed, out, "--batch", "64", "--workers", "1")) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "f.csv"], "--out: got 'f.csv', expected a file that ends in .parquet or .npz"),
        (["--out", ".npz"], "--out: got '.npz', expected a file"),
        (["--layers", "3"], "--layers: got 3, expected numbers from 1 .* to 2"),
        (["--layers", "last"], "--layers: got 'last'"),
        (["--images", "nowhere"], "--images: got 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_refused(
    run: Path, mixed: Mixed, tmp_path: Path, more: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        main([*words(run, mixed, tmp_path / "f.npz"), *more])


def test_a_place_that_takes_no_file_is_refused_before_the_work(run: Path, mixed: Mixed, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"--out: got .*f\.npz', expected a file that can be written .*directory"
    ):
        main(words(run, mixed, tmp_path / "file" / "new" / "f.npz"))


def test_sources_without_an_image_that_can_be_read_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    command = [str(run), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "f.npz"), "--device", "cpu"]
    with pytest.raises(DataError, match="no image found"):
        main(command)
    (tmp_path / "images" / "a.jpg").write_bytes(b"none")
    with pytest.raises(
        DataError, match=r"none of the 1 images can be read; .*f.npz.unreadable.csv has the reasons"
    ):
        main(command)
    assert not (tmp_path / "f.npz").exists()


def test_without_pyarrow_parquet_is_refused_at_once_and_npz_is_written(
    run: Path, mixed: Mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConfigError, match=r"this package, for .parquet. pip install 'beit_dist\[parquet\]', or use another"
    ):
        main(words(run, mixed, tmp_path / "f.parquet"))
    assert main(words(run, mixed, tmp_path / "f.npz")) == 0


def test_an_image_that_may_not_be_read_is_unreadable_and_one_that_is_gone_stops(
    run: Path, tmp_path: Path, mixed: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(mixed.sources[2])
    command = [str(run), "--images", str(folder), "--out", str(tmp_path / "f.npz"), "--device", "cpu"]
    original = Folder.read

    def refusing(error: OSError) -> Callable[[Any, Any, Any], bytes]:
        def read(source: Any, entry: Any, access: Any) -> bytes:
            if entry.name == b"f/3.png":
                raise error
            return original(source, entry, access)

        return read

    monkeypatch.setattr(Folder, "read", refusing(FileNotFoundError(2, "gone")))
    with pytest.raises(DataError, match=r"f/3.png: cannot be read \(gone\)"):
        main(command)
    monkeypatch.setattr(Folder, "read", refusing(PermissionError(13, "denied")))
    assert main(command) == 0
    assert unreadable(tmp_path / "f.npz")[1:] == [[str(folder), "f/3.png", "cannot be read (denied)"]]


def test_a_disk_without_room_is_refused(
    run: Path, mixed: Mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4000}))
    with pytest.raises(SpaceError, match=r"has 3.9 KiB free, expected 5.2 KiB for the features of 42 images"):
        main(words(run, mixed, tmp_path / "f.npz"))


def test_a_dry_run_tells_counts_bytes_and_time_and_writes_nothing(
    run: Path, mixed: Mixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(run, mixed, tmp_path / "f.parquet", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "images  42 of 6 classes in 3 sources" in shown
    assert "f.parquet: 2.6 KiB of features (mean_1)" in shown
    assert "space   5.2 KiB while it is made" in shown
    assert "ms an image on one rank (42 looked at, 3 of which cannot be read)" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [4.0, 0.1])
def test_an_estimate_holds_for_a_model_so_slow_that_its_first_batch_is_all_there_is_time_for(
    run: Path, mixed: Mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    job, clock = job_of(parser().parse(words(run, mixed, tmp_path / "f.npz"))), [0.0]
    make = job.work.make

    def slowly(prepared: Sequence[Any], numbers: Sequence[int] | None) -> Any:
        clock[0] += seconds * len(prepared)
        return make(prepared, numbers)

    monkeypatch.setattr(job.work, "make", slowly)
    monkeypatch.setattr(estimates, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = estimates.estimate(job, torch.device("cpu"))
    readable = 1 - found.unreadable / found.looked_at
    assert found.seconds == pytest.approx(seconds * readable, rel=0.2)
    assert found.looked_at == (3 if seconds > 1 else 42)
