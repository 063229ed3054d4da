"""A data set shown to a person: the numbers are right, the pictures are its samples, a look costs little."""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.figures import words_of

from beit_dist.commands import inspect as command
from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import ConfigError, DataError, TokenizerError
from beit_dist.models.dvae import DVAE
from beit_dist.reports import contact_sheet, dataset
from beit_dist.reports.dataset import inspect, lines, picked
from beit_dist.shards.manifest import Manifest, load_manifest
from beit_dist.shards.sample import SampleLayout
from beit_dist.shards.statistics import STATISTICS_NAME, load_statistics
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.storage.remote import RemotePlace
from beit_dist.weights.tokenizer_files import save_tokenizer

LAYOUT = SampleLayout(32, 8, 64)
Facts = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path: Path, make_shards: Callable[..., Manifest]) -> Path:
    make_shards(tmp_path / "data", shard_samples=[9, 8, 4], views=2)
    return tmp_path / "data"


@pytest.fixture
def facts(capsys: pytest.CaptureFixture[str]) -> Facts:
    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert command.main([*arguments, "--json", "-"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def stored(data: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All patches and tokens, read by the layout."""
    patches, tokens = [], []
    for shard in load_manifest(data).shards:
        raw = (data / shard.name).read_bytes()
        for row in range(shard.samples):
            at = row * LAYOUT.stride
            patches.append(np.frombuffer(raw, np.uint8, LAYOUT.patches_nbytes, at + LAYOUT.patches_start))
            tokens.append(np.frombuffer(raw, "<i2", LAYOUT.patches, at + LAYOUT.tokens_start))
    return np.stack(patches), np.stack(tokens)


def test_the_numbers_are_those_of_the_shards(data: Path, facts: Facts) -> None:
    found = facts(str(data))
    patches, tokens = stored(data)
    counts = Counter(tokens.reshape(-1).tolist())
    shares = [count / tokens.size for count in counts.values()]
    assert (found["samples"], found["views"], found["shards"], found["looked_at"]) == (21, 2, 6, 42)
    assert found["samples_of_a_shard"] == [4, 9]
    assert found["tokens"]["used"] == len(counts)
    assert found["tokens"]["perplexity"] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    assert found["tokens"]["most_frequent"][0][1] == pytest.approx(max(shares))
    assert found["tokens"]["distinct_of_a_sample"] == np.mean([len(set(row)) for row in tokens.tolist()])
    assert dict(found["labels"]["most_frequent"]) == {f"class-{number}": 14 for number in range(3)}
    values = patches.reshape(42, LAYOUT.patches, -1)[:, ::5].reshape(-1, 3) / 255
    assert found["colour_mean"] == pytest.approx(values.mean(axis=0), abs=1e-4)
    assert found["colour_deviation"] == pytest.approx(values.std(axis=0), abs=1e-4)


def test_a_part_is_looked_at_evenly_and_the_text_says_so(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = open_place(f"memory://{uuid.uuid4()}/data"), []
    for path in data.rglob("*.*"):
        place.write(path.relative_to(data).as_posix(), path.read_bytes())
    original = RemotePlace.read_into

    def noting(self: RemotePlace, name: str, offset: int, buffer: memoryview) -> None:
        read.append((name, offset // LAYOUT.stride, len(buffer)))
        original(self, name, offset, buffer)

    monkeypatch.setattr(RemotePlace, "read_into", noting)
    assert command.main([str(place), "--samples", "6"]) == 0
    assert "looked at 6 of 42 samples, evenly spread over all shards" in capsys.readouterr().out
    rows = [0, 7, 14, 21, 28, 35]  # images 0, 7 and 14 of 21, in both views: shards of 9, 8, 4
    starts = {"v00/shard-000000.tar": 0, "v00/shard-000001.tar": 9, "v01/shard-000000.tar": 21}
    starts |= {"v01/shard-000001.tar": 30}
    assert sorted(starts[name] + row for name, row, _ in read) == rows
    assert {size for _, _, size in read} == {LAYOUT.stride}


def test_of_many_views_it_is_now_these_and_now_those(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    manifest = make_shards(tmp_path, shard_samples=[6], views=6)
    picks = picked(manifest, 12)
    assert picks == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (2, 0),
        (2, 1),
        (2, 4),
        (2, 5),
        (4, 2),
        (4, 3),
        (4, 4),
        (4, 5),
    ]
    assert len(picked(manifest, 36)) == len(set(picked(manifest, 99))) == 36
    assert picked(manifest, 2) == [(0, 0), (0, 1)]
    found = inspect(LocalPlace(tmp_path), manifest, 36, 8)
    assert [[sample.view for sample in views] for views in found.images] == [[0, 1, 2, 3]] * 2


def test_pictures_are_the_samples_with_their_patches_in_place(data: Path) -> None:
    found = inspect(LocalPlace(data), load_manifest(data), 1000, 5)
    patches, tokens = stored(data)
    assert [sample.key for sample in found.sheet] == [
        "v00-000000000000", "v01-000000000000", "v00-000000000007", "v01-000000000007",
        "v00-000000000014", "v01-000000000014",
    ]  # fmt: skip
    for sample, row in zip(found.sheet, (0, 21, 7, 28, 14, 35), strict=True):
        corner = sample.image[8:16, 16:24]  # patch (1, 2) of 4×4
        assert np.array_equal(corner.reshape(-1), patches[row].reshape(16, 192)[6])
        assert np.array_equal(sample.tokens, tokens[row])


def test_views_lie_side_by_side_under_their_names_each_beside_what_is_redrawn(data: Path) -> None:
    found = inspect(LocalPlace(data), load_manifest(data), 1000, 6)
    for number, sample in enumerate(found.sheet):
        found.sheet[number] = dataclasses.replace(sample, patches=np.full_like(sample.patches, 10 * number))
        found.redrawn.append(np.full((64, 64, 3), 100 + 10 * number, np.uint8))
    mosaic = contact_sheet.lay_out(found)
    names = [label for label in mosaic.labels if label.text.startswith("image-")]
    views = [label for label in mosaic.labels if label.text.startswith("view")]
    assert [label.text for label in names] == ["image-0.png", "image-7.png", "image-14.png"]
    assert [label.text.partition(",")[0] for label in views] == ["view 0", "view 1"] * 3
    assert views[0].text.endswith(f"redrawn {-20 * math.log10(100 / 255):.1f} dB")
    assert found.psnr == pytest.approx(-20 * math.log10(100 / 255))
    for number, label in enumerate(views):
        y = label.y + contact_sheet._TEXT_LINE + mosaic.cell // 2
        shades = [mosaic.pixels[y, label.x + mosaic.cell // 2 + side, 0] for side in (0, mosaic.cell)]
        assert shades == [10 * number, 100 + 10 * number]
        above = names[number // 2]
        assert above.y < label.y
        assert above.x <= label.x < above.x + above.width


def test_a_picture_is_drawn_and_a_foreign_tokenizer_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DVAEConfig(vocabulary=64, hidden=4, blocks_per_group=1, decoder_input=4)
    digest = save_tokenizer(tmp_path / "dvae.safetensors", DVAE(config), config)
    out = tmp_path / "pictures/report.png"
    options = ["--out", str(out), "--tokenizer", str(tmp_path / "dvae.safetensors")]
    with pytest.raises(TokenizerError, match="the one that made the shards"):
        command.main([str(data), *options])
    manifest = load_manifest(data)
    (data / "manifest.json").write_bytes(manifest.to_bytes().replace(manifest.tokenizer.encode(), digest.encode()))
    assert command.main([str(data), *options]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    assert "verdict on the tokenizer: poor. Its reconstructions are no better than a palette's" in said
    assert Image.open(out).width > 900


def test_damaged_samples_are_listed_and_left_out(data: Path, facts: Facts) -> None:
    path = data / "v00/shard-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[2 * LAYOUT.stride + LAYOUT.patches_start] ^= 1
    path.write_bytes(raw)
    found = facts(str(data), code=1)
    assert found["looked_at"] == 41
    assert not (data / STATISTICS_NAME).exists()
    assert found["damaged"][0].startswith("v00/shard-000001.tar, sample 2: crc32: got")
    for shard in data.glob("v*/*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="none of 42 samples can be read"):
        facts(str(data))


def test_names_of_any_kind_are_shown_as_they_are(data: Path, tmp_path: Path, figures: list[Figure]) -> None:
    found = inspect(LocalPlace(data), load_manifest(data), 5, 2)
    alike = ["the same first twenty-four letters, a", "the same first twenty-four letters, b"]
    found.labels = Counter(["$a_{$", "line\nbreak", "not \udcff UTF-8", *alike])
    found.sheet[0] = dataclasses.replace(found.sheet[0], notes={"source": "a/$x_{$.jpg"})
    contact_sheet.draw_sheet(found, tmp_path / "sheet.png")
    bars = figures[0].axes[-1] if figures[0].axes[-1].patches else figures[0].axes[-2]
    assert len(bars.patches) == 5
    names = {tick.get_text() for tick in bars.get_yticklabels()}
    assert {r"line\nbreak", r"not \udcff UTF-8", "$a_{$"} < names
    assert "a/$x_{$.jpg" in words_of(figures[0])
    text = "\n".join(lines(found.facts()))
    assert r"line\nbreak 1, not \udcff UTF-8 1" in text


def test_what_cannot_be_read_is_listed_and_a_sheet_of_nothing_is_drawn(
    data: Path, facts: Facts, tmp_path: Path
) -> None:
    first = data / "v00/shard-000000.tar"
    first.unlink()
    first.mkdir()
    found = facts(str(data), "--out", str(tmp_path / "sheet.png"), "--pictures", "1", code=1)
    assert len(found["damaged"]) == 9
    assert "Is a directory" in found["damaged"][0]
    assert (tmp_path / "sheet.png").exists()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=r"--out: .*Is a directory"):
        command.main([str(data), "--out", str(tmp_path / "folder.png")])


def test_statistics_are_written_where_there_are_none_and_kept_where_there_are(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(data)
    assert command.main([str(data), "--samples", "6"]) == 0
    some = load_statistics(data, manifest)
    assert some is not None
    assert (some.whole, some.tally.samples) == (False, 6)
    assert capsys.readouterr().out.endswith(
        f"wrote {data}/statistics.json, from which runs take their baselines\n"
    )
    (data / STATISTICS_NAME).unlink()
    assert command.main([str(data)]) == 0
    every = load_statistics(data, manifest)
    assert every is not None
    assert (every.whole, every.tally.samples) == (True, 42)
    assert every.tally.tokens.tolist() == np.bincount(stored(data)[1].reshape(-1), minlength=64).tolist()
    capsys.readouterr()
    before = (data / STATISTICS_NAME).read_bytes()
    assert command.main([str(data), "--samples", "6"]) == 0
    printed = capsys.readouterr().out
    assert "looked at 6 of 42 samples" in printed
    assert ", in all samples\n" in printed
    assert f"loss 4.16 (uniform), {every.entropy:.2f} (frequency)" in printed
    assert f"accuracy {every.commonest_share:.2%} (commonest token)" in printed
    assert "statistics.json" not in printed
    assert (data / STATISTICS_NAME).read_bytes() == before


def test_held_out_images_are_named(
    data: Path,
    make_shards: Callable[..., Manifest],
    facts: Facts,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert facts(str(data))["held_out"] == 0
    make_shards(data / "held-out", [3], first=21)
    assert facts(str(data))["held_out"] == 3
    command.main([str(data)])
    assert f"  held out   3 samples in {data}/held-out\n" in capsys.readouterr().out


def test_some_samples_are_looked_at_of_data_that_is_large_or_counted(
    data: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SAMPLES", 5)
    assert facts(str(data))["looked_at"] == 42
    assert facts(str(data))["looked_at"] == 5
    (data / STATISTICS_NAME).unlink()
    monkeypatch.setattr(dataset, "_COUNTED_WHOLE", 1000)
    assert facts(str(data))["looked_at"] == 5


def test_a_folder_that_cannot_be_written_is_inspected_all_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: LocalPlace, name: str, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalPlace, "write", refuse)
    assert command.main([str(data)]) == 0
    assert "statistics.json: cannot be written (Permission denied), so runs show no" in capsys.readouterr().out


def test_wrong_options_are_user_errors(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out: got 'sheet', expected a file \*\.png"):
        command.main([str(data), "--out", "sheet"])
    with pytest.raises(ConfigError, match="--samples"):
        command.main([str(data), "--samples", "0"])
    with pytest.raises(DataError, match="not found"):
        command.main([str(tmp_path)])
