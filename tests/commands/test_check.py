"""Every kind of damage to a data set is found, and named with its place."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fault_proxy import Fault, FaultProxy
from support.object_store import ObjectStore

from beit_dist.commands import check as command
from beit_dist.errors import AccessError, ConfigError, DataError, StorageError
from beit_dist.reports.dataset import inspect
from beit_dist.shards.manifest import Manifest, load_manifest
from beit_dist.shards.sample import SampleLayout, sample_crc
from beit_dist.shards.statistics import Statistics, Tally, write_statistics
from beit_dist.shards.verification import Census, verify
from beit_dist.storage.durable import TEMPORARY
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place

SHARDS = [4, 3, 2]
NAME = "v01/shard-000001.tar"
ROW = 2
LAYOUT = SampleLayout(32, 8, 64)
START = ROW * LAYOUT.stride
KEY = "v01-000000000006"
HEADER = 512


@pytest.fixture
def data(tmp_path: Path, make_shards: Callable[..., Manifest]) -> Path:
    make_shards(tmp_path / "data", shard_samples=SHARDS, views=2)
    return tmp_path / "data"


def check(data: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = command.main([str(data), *options])
    return code, capsys.readouterr().out


def change(data: Path, offset: int, flip: int = 1) -> None:
    path = data / NAME
    raw = bytearray(path.read_bytes())
    raw[offset] ^= flip
    path.write_bytes(raw)


def test_a_whole_data_set_passes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(data, capsys)
    assert code == 0
    assert "whole: 6 shards, 9 samples × 2 views" in out


def test_gaps_in_the_ids_are_no_fault(
    tmp_path: Path, make_shards: Callable[..., Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, shard_samples=[4, 3], views=3, gaps=4)
    assert check(tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "byte {at}: tar header of json"),
        (300, "byte {at}: tar header of json"),
        (LAYOUT.json_start + 12, "crc32 of key, patches and tokens"),
        (LAYOUT.json_start + 1, "byte {json}: json: got"),
        (LAYOUT.json_start + 27, "byte {json}: json: got"),
        (LAYOUT.json_start + 511, "json: got"),
        (LAYOUT.patches_start - 128 - HEADER + 5, "byte {at}: tar header of patches.npy"),
        (LAYOUT.patches_start - 100, "byte {at}: npy header"),
        (LAYOUT.patches_start, "crc32 of key, patches and tokens"),
        (LAYOUT.patches_start + LAYOUT.patches_nbytes - 1, "crc32 of key, patches and tokens"),
        (LAYOUT.patches_start + LAYOUT.patches_nbytes, "byte {at}: padding of patches.npy"),
        (LAYOUT.tokens_start - 128 - HEADER, "byte {at}: tar header of tokens.npy"),
        (LAYOUT.tokens_start - 1, "byte {at}: npy header"),
        (LAYOUT.tokens_start + 3, "crc32 of key, patches and tokens"),
        (LAYOUT.stride - 1, "byte {at}: padding of tokens.npy"),
    ],
)
def test_one_wrong_bit_is_named_with_shard_sample_and_byte(
    data: Path, capsys: pytest.CaptureFixture[str], offset: int, message: str
) -> None:
    change(data, START + offset)
    code, out = check(data, capsys)
    assert code == 1
    expected = message.format(at=START + offset, json=START + LAYOUT.json_start)
    assert any(line.startswith(f"{NAME}, sample {ROW}") and expected in line for line in out.splitlines()), out
    assert f"{NAME}: sha256: got" in out
    others = [line for line in out.splitlines() if line.startswith("v0") and not line.startswith(NAME)]
    assert others == []


def test_a_wrong_letter_of_a_source_name_shows_in_the_sha256(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = (data / NAME).read_bytes()
    change(data, raw.index(b"image-", START))
    code, out = check(data, capsys)
    assert code == 1
    assert "name, label or box in some json" in out
    assert len(out.splitlines()) == 2


def test_every_single_bit_of_a_sample_is_covered(data: Path) -> None:
    """Whatever byte is changed is found, by a stride that shares no factor with the layout's sizes."""
    whole = (data / NAME).read_bytes()
    manifest = load_manifest(str(data))
    for offset in range(0, len(whole), 1237):
        change(data, offset, 0x10)
        assert list(verify(str(data), manifest)), offset
        (data / NAME).write_bytes(whole)
    assert not list(verify(str(data), manifest))


def reseal(data: Path) -> None:
    """Make the manifest agree with the files again, as a faulty writer would."""
    fields = json.loads((data / "manifest.json").read_bytes())
    for shard in fields["shards"]:
        shard["sha256"] = hashlib.sha256((data / shard["name"]).read_bytes()).hexdigest()
    manifest = Manifest._parse(json.dumps(fields).encode())
    (data / "manifest.json").write_bytes(manifest.to_bytes())


def test_tokens_out_of_range_are_found_though_every_checksum_is_right(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / NAME
    raw = bytearray(path.read_bytes())
    start = START + LAYOUT.tokens_start
    raw[start + 6 : start + 8] = (64).to_bytes(2, "little")
    patches = raw[START + LAYOUT.patches_start :][: LAYOUT.patches_nbytes]
    crc = sample_crc(KEY, bytes(patches), bytes(raw[start : start + LAYOUT.tokens_nbytes]))
    raw[START + 512 + 10 : START + 512 + 18] = f"{crc:08x}".encode()
    path.write_bytes(raw)
    reseal(data)
    code, out = check(data, capsys)
    assert code == 1
    assert out.splitlines()[0] == (
        f"{NAME}, sample {ROW} ({KEY}), byte {start + 6}: token 3: got 64, expected 0 to 63 (1 such tokens)"
    )


def test_truncated_missing_and_longer_shards_are_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"v00/shard-00000{index}.tar" for index in range(3)]
    whole = (data / names[0]).read_bytes()
    (data / names[0]).write_bytes(whole[: LAYOUT.stride + 100])
    (data / names[1]).unlink()
    (data / names[2]).write_bytes((data / names[2]).read_bytes() + b"more")
    code, out = check(data, capsys)
    assert code == 1
    assert f"{names[0]}: size: got {LAYOUT.stride + 100} bytes, expected {len(whole)}" in out
    assert f"{names[0]}, sample 1, byte {LAYOUT.stride}: cut short: got 100 bytes" in out
    assert f"{names[1]}: no such file" in out
    assert f"{names[2]}: size: got" in out
    assert f"{names[2]}, byte {len((data / names[2]).read_bytes()) - 4}: got data after the last sample" in out


@pytest.mark.parametrize("sealed", [False, True])
def test_swapped_shards_are_found(
    tmp_path: Path, make_shards: Callable[..., Manifest], capsys: pytest.CaptureFixture[str], sealed: bool
) -> None:
    """Also when the manifest was made of the swapped files: ids ascend, and are the same in every view."""
    make_shards(tmp_path, shard_samples=[3, 3], views=2)
    first, second = tmp_path / "v01/shard-000000.tar", tmp_path / "v01/shard-000001.tar"
    shutil.move(first, tmp_path / "x")
    shutil.move(second, first)
    shutil.move(tmp_path / "x", second)
    if sealed:
        reseal(tmp_path)
    code, out = check(tmp_path, capsys)
    assert code == 1
    assert "v01/shard-000000.tar, sample 0: sample id: got 3, expected 0 as in v00/shard-000000.tar" in out
    assert ("sha256" in out) is not sealed


def test_ids_that_repeat_or_go_back_are_found(
    tmp_path: Path, make_shards: Callable[..., Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, shard_samples=[3, 3])
    shutil.copy(tmp_path / "v00/shard-000000.tar", tmp_path / "v00/shard-000001.tar")
    reseal(tmp_path)
    code, out = check(tmp_path, capsys)
    assert code == 1
    assert "v00/shard-000001.tar, sample 0: sample id: got 0, expected more than 2" in out
    path = tmp_path / "v00/shard-000000.tar"
    raw = path.read_bytes()
    path.write_bytes(raw[LAYOUT.stride : 2 * LAYOUT.stride] + raw[: LAYOUT.stride] + raw[2 * LAYOUT.stride :])
    assert "sample 1: sample id: got 0, expected more than 1" in check(tmp_path, capsys)[1]


def test_the_view_of_a_key_must_be_its_folder(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(data / "v00/shard-000002.tar", data / "v01/shard-000002.tar")
    code, out = check(data, capsys)
    assert code == 1
    assert "v01/shard-000002.tar, sample 0 (v00-000000000007), byte 0: view: got 0, expected 1" in out


def test_a_shard_that_the_manifest_does_not_list_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "v00/shard-000009.tar").write_bytes(b"")
    (data / f"v00/.shard-000001.tar.x-1{TEMPORARY}").write_bytes(b"")
    code, out = check(data, capsys)
    assert code == 1
    assert "v00/shard-000009.tar: not in the manifest" in out
    assert "1 faults" in out


def test_the_list_of_faults_is_bounded_but_all_are_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in range(3):
        change(data, row * LAYOUT.stride + LAYOUT.patches_start)
    code, out = check(data, capsys, "--limit", "2", "--threads", "2")
    assert code == 1
    assert sum(line.startswith(NAME) for line in out.splitlines()) == 2
    assert "and 2 more" in out
    assert "4 faults" in out


def test_a_data_set_at_a_url_has_the_faults_of_its_local_copy(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = open_place(f"memory://{uuid.uuid4()}/data")
    change(data, START + LAYOUT.patches_start + 5)
    cut = data / "v00/shard-000000.tar"
    cut.write_bytes(cut.read_bytes()[: LAYOUT.stride + 100])
    (data / "v00/shard-000009.tar").write_bytes(b"x")
    upload(data, place)
    code, out = check(data, capsys)
    assert command.main([str(place), "--threads", "3"]) == code == 1
    assert capsys.readouterr().out == out.replace(str(data), str(place))
    (place / "v01").remove("shard-000002.tar")
    assert command.main([str(place)]) == 1
    assert "v01/shard-000002.tar: no such file" in capsys.readouterr().out


def test_a_place_that_gives_files_and_no_lists_is_checked_without_them(
    data: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(place: Place, name: str = "") -> list[str]:
        raise AccessError("403: Forbidden")

    monkeypatch.setattr(LocalPlace, "list", refuse)
    assert check(data, capsys)[0] == 0
    assert "cannot be listed" in caplog.text
    change(data, START + LAYOUT.patches_start + 5)
    assert check(data, capsys)[0] == 1


def test_a_shard_that_the_store_refuses_is_one_fault_among_others(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 403 for missing keys to those who may not list."""
    size = LocalPlace.size

    def refuse(place: LocalPlace, name: str) -> int:
        if name == NAME:
            raise AccessError("403: Forbidden")
        return size(place, name)

    monkeypatch.setattr(LocalPlace, "size", refuse)
    (data / "v00/shard-000000.tar").unlink()
    code, out = check(data, capsys)
    assert code == 1
    assert f"{NAME}: missing, or reading it is not allowed (403: Forbidden)" in out
    assert "2 faults in" in out


def test_a_shard_that_cannot_be_read_is_not_called_missing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / NAME).unlink()
    (data / NAME).mkdir()
    code, out = check(data, capsys)
    assert code == 1
    assert f"{NAME}: cannot be read (Is a directory)" in out


def test_a_data_set_in_a_store_that_fails_is_checked_all_the_same(
    data: Path,
    object_store: ObjectStore,
    failing_store: FaultProxy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = open_place(f"s3://{object_store.new_bucket()}/data")
    upload(data, place)
    chances = {"slow_down": 0.1, "reset": 0.1, "cut": 0.1, "whole": 0.2}
    failing_store.inject(*(Fault(kind, method="GET", chance=chance) for kind, chance in chances.items()))  # type: ignore[arg-type]
    assert command.main([str(place)]) == 0
    assert "whole: 6 shards, 9 samples × 2 views" in capsys.readouterr().out
    assert failing_store.injected
    failing_store.inject(Fault("slow_down"))
    with pytest.raises(StorageError, match=r"storage\.retry_seconds"):
        command.main([str(place), "--storage", "retry_seconds=0.5"])


def upload(data: Path, place: Place) -> None:
    for path in data.rglob("*.*"):
        if path.is_file():
            place.write(path.relative_to(data).as_posix(), path.read_bytes())


@pytest.fixture
def with_held_out(data: Path, make_shards: Callable[..., Manifest]) -> Path:
    """9 samples in 2 views, and 4 samples with the ids behind theirs held out."""
    make_shards(data / "held-out", shard_samples=[4], first=9)
    return data


def test_held_out_images_are_verified_too(with_held_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(with_held_out, capsys)
    assert code == 0
    assert "whole: 7 shards, 9 samples × 2 views and 4 held out" in out
    path = with_held_out / "held-out/v00/shard-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[LAYOUT.patches_start] ^= 1
    path.write_bytes(raw)
    code, out = check(with_held_out, capsys)
    assert code == 1
    assert out.startswith("held-out/v00/shard-000000.tar, sample 0 (v00-000000000009), byte 1664: crc32")


def test_an_id_that_is_trained_on_and_held_out_is_a_fault(
    data: Path, make_shards: Callable[..., Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(data / "held-out", shard_samples=[4], first=8)
    code, out = check(data, capsys)
    assert code == 1
    assert out.startswith("held-out: sample ids: got 8 to 11, expected none from 0 to 8, which are trained on")


def test_statistics_are_compared_with_the_samples_and_are_no_fault(
    with_held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "statistics.json: none of this data set, so runs show no baselines. Run beit inspect"
    assert check(with_held_out, capsys)[1].count(missing) == 2
    for folder in (with_held_out, with_held_out / "held-out"):
        place, manifest = LocalPlace(folder), load_manifest(str(folder))
        census = Census(Tally.empty(manifest.layout))
        assert not list(verify(place, manifest, 2, lambda _: None, census))
        assert census.tally.samples == manifest.samples * manifest.views
        statistics = Statistics(census.tally, whole=True)
        assert inspect(place, manifest, 100, 0).statistics == statistics
        write_statistics(place, manifest, statistics)
    code, out = check(with_held_out, capsys)
    assert (code, "statistics.json" in out) == (0, False)
    tokens = census.tally.tokens
    tokens[[tokens.argmax(), tokens.argmin()]] += (-1, 1)
    write_statistics(place, manifest, Statistics(census.tally, whole=True))
    code, out = check(with_held_out, capsys)
    assert code == 0
    assert out.startswith(f"{with_held_out}/held-out/statistics.json: its counts are not those of the samples")
    assert "whole: " in out


def test_no_data_set_or_a_wrong_option_is_a_user_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found") as caught:
        command.main([str(tmp_path)])
    assert caught.value.exit_code == 2
    wrong: Any
    for wrong in (["--threads", "0"], ["--limit", "0"]):
        with pytest.raises(ConfigError):
            command.main([str(data), *wrong])
