"""A data set shown to a person: the numbers are right, the pictures are its samples, a look costs little."""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_dist.config import DVAEConfig
from beit_dist.data.shards import Manifest, SampleLayout, load_manifest
from beit_dist.errors import ConfigError, DataError, TokenizerError
from beit_dist.reports import contact_sheet
from beit_dist.reports.dataset import inspect, lines
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.storage.remote import RemotePlace
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.weights import save_tokenizer

LAYOUT = SampleLayout(32, 8, 64)
Facts = Callable[..., dict[str, Any]]


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("inspect_shards")


@pytest.fixture
def data(tmp_path: Path, make_shards: Callable[..., Manifest]) -> Path:
    make_shards(tmp_path / "data", shard_samples=[9, 8, 4], views=2)
    return tmp_path / "data"


@pytest.fixture
def facts(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Facts:
    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert tool.main([*arguments, "--json"]) == code
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
    assert found["colour_mean"] == pytest.approx((patches.reshape(-1, 3) / 255).mean(axis=0), abs=1e-3)
    assert found["colour_deviation"] == pytest.approx((patches.reshape(-1, 3) / 255).std(axis=0), abs=1e-3)


def test_a_part_is_looked_at_evenly_and_the_text_says_so(
    data: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = open_place(f"memory://{uuid.uuid4()}/data"), []
    for path in data.rglob("*.*"):
        place.write(path.relative_to(data).as_posix(), path.read_bytes())
    original = RemotePlace.read_into

    def noting(self: RemotePlace, name: str, offset: int, buffer: memoryview) -> None:
        read.append((name, offset // LAYOUT.stride, len(buffer)))
        original(self, name, offset, buffer)

    monkeypatch.setattr(RemotePlace, "read_into", noting)
    assert tool.main([str(place), "--samples", "6"]) == 0
    assert "looked at 6 of 42 samples, evenly spread over all shards" in capsys.readouterr().out
    rows = [0, 7, 14, 21, 28, 35]  # of 42: shards of 9, 8, 4 in two views
    starts = {"v00/shard-000000.tar": 0, "v00/shard-000001.tar": 9, "v01/shard-000000.tar": 21}
    starts |= {"v01/shard-000001.tar": 30}
    assert sorted(starts[name] + row for name, row, _ in read) == rows
    assert {size for _, _, size in read} == {LAYOUT.stride}


def test_pictures_are_the_samples_with_their_patches_in_place(data: Path) -> None:
    found = inspect(LocalPlace(data), load_manifest(data), 1000, 5)
    patches, tokens = stored(data)
    assert [sample.key for sample in found.sheet] == [
        "v00-000000000000", "v00-000000000008", "v00-000000000016", "v01-000000000004", "v01-000000000012",
    ]  # fmt: skip
    for sample, row in zip(found.sheet, (0, 8, 16, 25, 33), strict=True):
        corner = sample.image[8:16, 16:24]  # patch (1, 2) of 4×4
        assert np.array_equal(corner.reshape(-1), patches[row].reshape(16, 192)[6])
        assert np.array_equal(sample.tokens.reshape(-1), tokens[row])


def test_the_sheet_holds_images_beside_their_reconstructions() -> None:
    images = [np.full((32, 32, 3), shade, np.uint8) for shade in (10, 20, 30)]
    redrawn = [np.full((64, 64, 3), shade, np.uint8) for shade in (110, 120, 130)]
    mosaic, cell = contact_sheet._mosaic(images, redrawn), contact_sheet._CELL
    seen = [[mosaic[y, x, 0] for x in (5, cell + 5)] for y in (5, cell + contact_sheet._GAP + 5)]
    assert seen[0] == [10, 110]
    assert {*np.unique(mosaic)} == {10, 20, 30, 110, 120, 130, 255}


def test_a_picture_is_drawn_and_a_foreign_tokenizer_refused(
    tmp_path: Path, data: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DVAEConfig(vocabulary=64, hidden=4, blocks_per_group=1, decoder_input=4)
    digest = save_tokenizer(tmp_path / "dvae.safetensors", DVAE(config), config)
    out = tmp_path / "pictures/report.png"
    options = ["--out", str(out), "--tokenizer", str(tmp_path / "dvae.safetensors")]
    with pytest.raises(TokenizerError, match="the one that made the shards"):
        tool.main([str(data), *options])
    manifest = load_manifest(data)
    (data / "manifest.json").write_bytes(manifest.to_bytes().replace(manifest.tokenizer.encode(), digest.encode()))
    assert tool.main([str(data), *options]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert Image.open(out).width > 1000


def test_damaged_samples_are_listed_and_left_out(data: Path, facts: Facts) -> None:
    path = data / "v00/shard-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[2 * LAYOUT.stride + LAYOUT.patches_start] ^= 1
    path.write_bytes(raw)
    found = facts(str(data), code=1)
    assert found["looked_at"] == 41
    assert found["damaged"][0].startswith("v00/shard-000001.tar, sample 2: crc32: got")
    for shard in data.glob("v*/*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="none of 42 samples can be read"):
        facts(str(data))


def test_names_of_any_kind_are_shown_as_they_are(data: Path, tmp_path: Path) -> None:
    found = inspect(LocalPlace(data), load_manifest(data), 5, 2)
    alike = ["the same first twenty-four letters, a", "the same first twenty-four letters, b"]
    found.labels = Counter(["$a_{$", "line\nbreak", "not \udcff UTF-8", *alike])
    shown = {}

    def note(figure: Any, out: Path) -> None:
        axes = figure.subfigs[1].axes[2]
        shown["bars"], shown["names"] = len(axes.patches), [tick.get_text() for tick in axes.get_yticklabels()]
        savefig(figure, out)

    savefig = contact_sheet.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contact_sheet.Figure, "savefig", note)
        contact_sheet.draw_sheet(found, None, tmp_path / "sheet.png")
    assert shown["bars"] == 5
    assert {r"line\nbreak", r"not \udcff UTF-8", "$a_{$"} < set(shown["names"])
    text = "\n".join(lines(found.facts()))
    assert r"line\nbreak 1, not \udcff UTF-8 1" in text


def test_what_cannot_be_read_is_listed_and_a_sheet_of_nothing_is_drawn(
    data: Path, tool: ModuleType, facts: Facts, tmp_path: Path
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
        tool.main([str(data), "--out", str(tmp_path / "folder.png")])


def test_wrong_options_are_user_errors(data: Path, tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out: got 'sheet', expected a file \*\.png"):
        tool.main([str(data), "--out", "sheet"])
    with pytest.raises(ConfigError, match="--samples"):
        tool.main([str(data), "--samples", "0"])
    with pytest.raises(DataError, match="not found"):
        tool.main([str(tmp_path)])
