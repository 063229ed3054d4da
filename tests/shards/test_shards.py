"""The shard format keeps its layout, and is read by everybody else's tools."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from beit_dist.errors import ConfigError, DataError, SampleError
from beit_dist.shards.manifest import FORMAT, Manifest, check_shard_files, load_manifest
from beit_dist.shards.sample import (
    SampleLayout,
    SampleNotes,
    checked_sample_id,
    decode_head,
    encode_notes,
    parse_key,
    sample_crc,
    sample_key,
)
from beit_dist.shards.writer import ShardWriter
from beit_dist.storage.opening import open_place

BASE = SampleLayout(224, 16, 8192)
TINY = SampleLayout(16, 8, 32)


def write(layout: SampleLayout, samples: int) -> bytes:
    stream = io.BytesIO()
    writer = ShardWriter(stream, layout)
    for row in range(samples):
        patches = np.full((layout.patches, layout.patch_bytes), row, np.uint8)
        tokens = np.full((layout.grid, layout.grid), row, np.int16)
        writer.write(sample_key(0, 3 * row), patches, tokens, SampleNotes(f"{row}.png"))
    written = writer.close()
    assert (written.bytes, written.samples) == (len(stream.getvalue()), samples)
    return stream.getvalue()


def test_the_checksum_is_zlibs_crc32_whatever_computes_it() -> None:
    patches, tokens = np.arange(200_000, dtype=np.uint64).view(np.uint8), np.arange(196, dtype=np.int16)
    whole = b"v00-000000000007" + patches.tobytes() + tokens.tobytes()
    assert sample_crc("v00-000000000007", patches.data, tokens.data.cast("B")) == zlib.crc32(whole)


def test_the_layout_at_224_16_is_the_documented_one() -> None:
    assert (BASE.grid, BASE.patches, BASE.patch_bytes) == (14, 196, 768)
    assert BASE.member_starts == (512, 1536, 153_088)
    assert (BASE.patches_start, BASE.tokens_start, BASE.stride) == (1664, 153_216, 154_112)
    assert 64 * BASE.stride == 9_863_168
    assert BASE.shard_bytes(4096) == 631_244_800


@pytest.mark.parametrize("layout", [BASE, TINY, SampleLayout(384, 16, 8192), SampleLayout(30, 5, 4)])
def test_every_member_lies_where_the_layout_says(layout: SampleLayout) -> None:
    raw = write(layout, 3)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        found = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
    expected = []
    for row in range(3):
        for extension, start, size in zip(
            ("json", "patches.npy", "tokens.npy"), layout.member_starts, layout.member_sizes, strict=True
        ):
            expected.append((f"{sample_key(0, 3 * row)}.{extension}", row * layout.stride + start, size))
    assert found == expected
    assert len(raw) == layout.shard_bytes(3)
    assert not any(raw[3 * layout.stride :])


def test_npy_headers_are_those_of_numpy() -> None:
    for layout in (BASE, TINY):
        for header, array in (
            (layout.patches_npy_header, np.zeros((layout.patches, layout.patch_bytes), np.uint8)),
            (layout.tokens_npy_header, np.zeros((layout.grid, layout.grid), "<i2")),
        ):
            stream = io.BytesIO()
            np.save(stream, array)
            assert stream.getvalue()[:128] == header
            assert len(header) == 128


def test_plain_webdataset_reads_the_shards(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    manifest = make_shards(tmp_path, shard_samples=[3, 2])
    urls = [str(tmp_path / shard.name) for shard in manifest.view_shards(0)]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample_key(0, row) for row in range(5)]
    layout = manifest.layout
    for sample in samples:
        patches = np.load(io.BytesIO(sample["patches.npy"]))
        tokens = np.load(io.BytesIO(sample["tokens.npy"]))
        assert patches.shape == (layout.patches, layout.patch_bytes)
        assert patches.dtype == np.uint8
        assert tokens.shape == (layout.grid, layout.grid)
        assert tokens.dtype == np.int16
        notes = json.loads(sample["json"])
        assert notes["key"] == sample["__key__"]
        assert int(notes["crc32"], 16) == sample_crc(notes["key"], patches.tobytes(), tokens.tobytes())


def test_the_bytes_of_a_shard_never_change() -> None:
    assert hashlib.sha256(write(TINY, 3)).hexdigest() == GOLDEN_SHARD


GOLDEN_SHARD = "ff8bd2899e59802dcf86e52929616ee4a32079d516ce950c9a5ad48575233c30"
"""Changes only with a new FORMAT_VERSION: data sets made by older releases must be reproducible."""


def test_the_head_gives_crc_and_key_and_refuses_anything_else() -> None:
    raw = write(TINY, 2)
    second = memoryview(raw)[TINY.stride : TINY.stride + TINY.patches_start]
    patches, tokens = bytes([1] * TINY.patches_nbytes), np.full(TINY.patches, 1, "<i2").tobytes()
    assert decode_head(TINY, second) == (sample_crc(sample_key(0, 3), patches, tokens), sample_key(0, 3))
    with pytest.raises(DataError, match="json"):
        decode_head(TINY, memoryview(raw)[512 : 512 + TINY.patches_start])
    with pytest.raises(DataError, match="npy header"):
        decode_head(SampleLayout(24, 8, 32), second)
    with pytest.raises(DataError, match="expected 1664"):
        decode_head(TINY, second[:-1])


def test_an_id_is_given_only_where_the_key_is_all_digits() -> None:
    sample = write(TINY, 1)[: TINY.stride]
    bounds = [0, TINY.patches_start, TINY.patches_start + TINY.patches_nbytes, TINY.tokens_start]
    ends = [*bounds[1:], TINY.tokens_start + TINY.tokens_nbytes]

    def pieces(raw: bytes) -> list[memoryview]:
        return [memoryview(raw)[start:end] for start, end in zip(bounds, ends, strict=True)]

    head, patches, _, tokens = pieces(sample)
    crc, key = decode_head(TINY, head)
    assert checked_sample_id(TINY, *pieces(sample), 0) == parse_key(key)[1]
    for wrong in ("v00-0000000_0000", "v00-+00000000003", "v00- 00000000003"):  # int() takes all of them
        right_crc = sample_crc(wrong, patches, tokens)
        old, new = f'"{crc:08x}","key":"{key}"', f'"{right_crc:08x}","key":"{wrong}"'
        with pytest.raises(DataError, match="json: got"):
            checked_sample_id(TINY, *pieces(sample.replace(old.encode(), new.encode())), 0)


def test_keys_round_trip_and_have_no_dots() -> None:
    key = sample_key(2, 123_456)
    assert key == "v02-000000123456"
    assert parse_key(key) == (2, 123_456)
    for wrong in ("v2-000000123456", "v02-00000012345", "v02-000000123456.json", "x02-000000123456"):
        with pytest.raises(DataError, match="sample key"):
            parse_key(wrong)
    with pytest.raises(ConfigError):
        sample_key(100, 0)
    with pytest.raises(ConfigError):
        sample_key(0, 10**12)


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "x" * 1000 + "/end.jpg",
        "ü" * 300 + "end.jpg",
        '"\\' * 300 + "end.jpg",
        "\n\x01" * 200 + "end.jpg",
        "🦊" * 200 + "end.jpg",
        "\udcff" * 200 + "end.jpg",  # os.fsdecode of a name that is no UTF-8
        "",
    ],
)
def test_the_json_is_valid_utf8_of_512_bytes_whatever_the_name(name: str) -> None:
    raw = encode_notes(0xAB, sample_key(1, 7), SampleNotes(name, "cat", (1, 2, 30, 40), True))
    assert len(raw) == 512
    assert raw.startswith(b'{"crc32":"000000ab","key":"v01-000000000007","source":"')
    fields = json.loads(raw.decode("utf-8"))
    assert name.endswith(fields["source"])
    assert (fields["label"], fields["box"], fields["flip"]) == ("cat", [1, 2, 30, 40], True)
    assert len(raw.rstrip(b" ")) > 500 or fields["source"] == name


def test_a_label_is_never_cut() -> None:
    label = "l" * 300
    assert json.loads(encode_notes(0, sample_key(0, 0), SampleNotes("n" * 400, label)))["label"] == label
    with pytest.raises(DataError, match="label"):
        encode_notes(0, sample_key(0, 0), SampleNotes("", "l" * 500))


def test_the_writer_refuses_what_the_format_cannot_hold() -> None:
    writer = ShardWriter(io.BytesIO(), TINY)
    patches = np.zeros((TINY.patches, TINY.patch_bytes), np.uint8)
    tokens = np.zeros((TINY.grid, TINY.grid), np.int16)
    wrong: list[tuple[Any, Any, str]] = [
        (patches[:-1], tokens, "patches"),
        (patches.astype(np.int8), tokens, "patches"),
        (patches, tokens.reshape(-1), "tokens"),
        (patches, tokens.astype(np.int64), "tokens"),
        (patches, tokens + np.int16(32), "0..31"),
        (patches, tokens - np.int16(1), "0..31"),
    ]
    for bad_patches, bad_tokens, message in wrong:
        with pytest.raises(DataError, match=message):
            writer.write(sample_key(0, 0), bad_patches, bad_tokens, SampleNotes("a"))
    assert writer.samples == 0


def test_a_tar_writer_with_other_headers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = wds.TarWriter

    def with_pax_headers(stream: Any, **kwargs: Any) -> Any:
        return original(stream, **{**kwargs, "mtime": 0.5, "format": "PAX_FORMAT"})

    monkeypatch.setattr(wds, "TarWriter", with_pax_headers)
    with pytest.raises(SampleError, match="tar writer"):
        write(TINY, 1)


def test_the_manifest_round_trips_and_its_digest_is_its_sha256(
    tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    manifest = make_shards(tmp_path, shard_samples=[4, 3], views=2, gaps=2)
    raw = (tmp_path / "manifest.json").read_bytes()
    loaded = load_manifest(str(tmp_path))
    assert loaded == manifest
    assert loaded.digest == hashlib.sha256(raw).hexdigest()
    assert (loaded.samples, loaded.views, loaded.rejected) == (7, 2, 2)
    assert [shard.name for shard in loaded.view_shards(1)] == ["v01/shard-000000.tar", "v01/shard-000001.tar"]
    assert json.loads(raw)["format"] == FORMAT
    check_shard_files(str(tmp_path), loaded)


def test_the_manifest_holds_no_path_time_or_host(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    one = make_shards(tmp_path / "a")
    two = make_shards(tmp_path / "b")
    assert one.digest == two.digest
    assert str(tmp_path).encode() not in one.to_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version: got 2"),
        (lambda m: m.update(format="else"), "format"),
        (lambda m: m.pop("views"), "views"),
        (lambda m: m.update(views=3), "the same ascending names in each of 3 views"),
        (lambda m: m.update(views=0), "views"),
        (lambda m: m.update(grid=[4, 5]), "grid"),
        (lambda m: m.update(patch_size=7), "patch_size"),
        (lambda m: m.update(vocabulary=40_000), "vocabulary"),
        (lambda m: m.update(vocabulary=True), "vocabulary"),
        (lambda m: m.update(tokenizer="short"), "tokenizer"),
        (lambda m: m.update(rejected=-1), "rejected"),
        (lambda m: m.update(write_seed="0"), "write_seed"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m.update(shards={}), "shards"),
        (lambda m: m["shards"].pop(), "names"),
        (lambda m: m["shards"].reverse(), "names"),
        (lambda m: m["shards"][0].pop("sha256"), "sha256"),
        (lambda m: m["shards"][0].update(bytes=1), "v00/shard-000000.tar bytes"),
        (lambda m: m["shards"][0].update(samples=0), "samples"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), "name"),
        (lambda m: m["shards"][0].update(sha256="x"), "sha256"),
        (lambda m: m.update(comment="hello"), "another form"),
    ],
)
def test_a_wrong_manifest_is_refused_naming_the_field(
    tmp_path: Path, make_shards: Callable[..., Manifest], change: Callable[[Any], object], message: str
) -> None:
    fields = json.loads(make_shards(tmp_path, shard_samples=[2, 1], views=2).to_bytes())
    change(fields)
    with pytest.raises(DataError, match=message) as caught:
        Manifest.from_bytes(json.dumps(fields).encode(), "there/manifest.json")
    assert str(caught.value).startswith("there/manifest.json: ")


def test_views_must_hold_the_same_samples(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    manifest = make_shards(tmp_path, shard_samples=[2, 1], views=2)
    last = manifest.shards[-1]
    other = dataclasses.replace(last, samples=2, bytes=manifest.layout.shard_bytes(2))
    with pytest.raises(DataError, match="samples of view 1"):
        dataclasses.replace(manifest, shards=(*manifest.shards[:-1], other))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(DataError, match=r"^m: "):
        Manifest.from_bytes(raw, "m")


def test_a_missing_manifest_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: not found.*--finish"):
        load_manifest(str(tmp_path))


def test_a_data_set_at_a_url_is_opened_and_checked_as_in_a_folder(
    tmp_path: Path, make_shards: Callable[..., Manifest]
) -> None:
    manifest = make_shards(tmp_path, shard_samples=[2, 2], views=2)
    url = f"memory://{uuid.uuid4()}/shards"
    place = open_place(url)
    with pytest.raises(DataError, match=rf"{url}/manifest\.json: not found.*--finish"):
        load_manifest(url)
    for name in ["manifest.json", *(shard.name for shard in manifest.shards)]:
        place.write(name, (tmp_path / name).read_bytes())
    assert load_manifest(url) == load_manifest(place) == manifest
    check_shard_files(url, manifest)
    place.remove(manifest.shards[1].name)
    place.write(manifest.shards[2].name, b"short")
    with pytest.raises(DataError, match=r"2 of 4 shards.*\n.*v00/shard-000001\.tar: not found\n.*got 5 bytes"):
        check_shard_files(url, manifest)


def test_missing_and_short_shards_are_all_named(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    manifest = make_shards(tmp_path, shard_samples=[2, 2, 2])
    (tmp_path / manifest.shards[0].name).unlink()
    with open(tmp_path / manifest.shards[2].name, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="2 of 3") as caught:
        check_shard_files(str(tmp_path), manifest)
    assert "v00/shard-000000.tar: not found" in str(caught.value)
    assert "v00/shard-000002.tar: got 1000 bytes" in str(caught.value)
