"""A data set's statistics: what is counted, what follows from it, and that no file of them stops anybody."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from beit_dist.errors import AccessError
from beit_dist.shards.manifest import Manifest
from beit_dist.shards.sample import SampleLayout
from beit_dist.shards.statistics import (
    STATISTICS_NAME,
    Statistics,
    Tally,
    lines,
    load_statistics,
    write_statistics,
)
from beit_dist.storage.local import LocalPlace

LAYOUT = SampleLayout(image_size=8, patch_size=4, vocabulary=6)
Samples = list[tuple[NDArray[np.int16], NDArray[np.uint8]]]


def samples_of(seed: int, count: int, vocabulary: int = LAYOUT.vocabulary) -> Samples:
    draw = np.random.default_rng(seed)
    return [
        (
            draw.integers(0, vocabulary, (2, 2)).astype(np.int16),
            draw.integers(0, 256, (LAYOUT.patches, LAYOUT.patch_bytes), dtype=np.uint8),
        )
        for _ in range(count)
    ]


def tally_of(samples: Samples) -> Tally:
    tally = Tally.empty(LAYOUT)
    for tokens, patches in samples:
        tally.add(tokens, patches)
    return tally


@given(st.integers(0, 9), st.lists(st.integers(0, 12), max_size=3))
def test_parts_added_in_any_order_are_the_whole(seed: int, cuts: list[int]) -> None:
    samples = samples_of(seed, 12)
    edges = [0, *sorted(cuts), 12]
    parts = [tally_of(samples[a:b]) for a, b in itertools.pairwise(edges)]
    summed = Tally.empty(LAYOUT)
    for part in reversed(parts):
        summed += part
    assert summed == tally_of(samples)
    assert summed == Tally.from_json(json.loads(json.dumps(summed.to_json())), LAYOUT)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 6))
def test_what_follows_from_the_counts_is_what_its_name_says(seed: int, count: int, vocabulary: int) -> None:
    samples = samples_of(seed, count, vocabulary)
    statistics = Statistics(tally_of(samples), whole=True)

    def entropy(tokens: list[int]) -> float:
        shares = [number / len(tokens) for number in Counter(tokens).values()]
        return -sum(share * math.log(share) for share in shares)

    images = [tokens.reshape(-1).tolist() for tokens, _ in samples]
    everything = [token for tokens in images for token in tokens]
    (_, most), *_ = Counter(everything).most_common(1)
    assert statistics.entropy == pytest.approx(entropy(everything), abs=1e-12)
    assert statistics.perplexity == pytest.approx(math.exp(entropy(everything)))
    assert statistics.used == len(set(everything))
    assert everything.count(statistics.commonest_token) == most
    assert statistics.commonest_share == most / len(everything)
    assert statistics.share_of(0) == everything.count(0) / len(everything)
    assert statistics.image_entropy == pytest.approx(np.mean([entropy(tokens) for tokens in images]), abs=1e-12)
    own = [Counter(tokens).most_common(1)[0][1] / len(tokens) for tokens in images]
    assert statistics.image_commonest_share == pytest.approx(np.mean(own))
    values = np.concatenate([patches[::5].reshape(-1, 3) for _, patches in samples]) / 255
    assert statistics.pixel_mean == pytest.approx(values.mean(0))
    assert statistics.pixel_deviation == pytest.approx(values.std(0))


def test_pixels_are_counted_in_every_fifth_patch() -> None:
    layout = SampleLayout(image_size=12, patch_size=4, vocabulary=6)  # 9 patches: 0 and 5 are counted
    patches = np.full((9, 16, 3), 200, np.uint8)
    patches[0], patches[5] = (0, 10, 255), (30, 10, 255)
    tally = Tally.empty(layout)
    tally.add(np.zeros(9, np.int16), patches.reshape(9, 48))
    seen = [{value: int(count) for value, count in enumerate(row) if count} for row in tally.pixels]
    assert seen == [{0: 16, 30: 16}, {10: 32}, {255: 32}]


def test_the_cross_entropy_is_that_of_a_model_that_knows_the_other_sets_frequencies() -> None:
    here, there = (Statistics(tally_of(samples_of(seed, 5, 4)), whole=True) for seed in (1, 2))
    known = (there.tally.tokens + 1) / (there.tally.tokens + 1).sum()
    answers = np.repeat(np.arange(6), here.tally.tokens)
    assert here.cross_entropy(there) == pytest.approx(-np.log(known[answers]).mean())
    assert here.cross_entropy(there) > here.entropy
    many = Statistics(tally_of(samples_of(1, 5, 4) * 10_000), whole=True)
    assert here.cross_entropy(many) == pytest.approx(here.entropy, abs=1e-3)


@pytest.fixture
def data(tmp_path: Path, make_shards: Callable[..., Manifest]) -> tuple[LocalPlace, Manifest, Statistics]:
    """A data set of 5 samples in 2 views with statistics of its own."""
    manifest = make_shards(tmp_path, [3, 2], views=2, image_size=8, patch_size=4, vocabulary=6)
    statistics = Statistics(tally_of(samples_of(3, 10)), whole=True)
    write_statistics(LocalPlace(tmp_path), manifest, statistics)
    return LocalPlace(tmp_path), manifest, statistics


def test_the_file_is_read_back_and_can_be_read_by_a_person(data: Any) -> None:
    place, manifest, statistics = data
    assert load_statistics(str(place), manifest) == statistics
    fields = json.loads(place.read(STATISTICS_NAME))
    assert fields["entropy_nats"] == statistics.entropy
    assert fields["commonest_share"] == statistics.commonest_share
    first, second, third = lines(statistics)
    assert first.startswith("tokens in 10 samples: 6 of 6 in use, perplexity 5.")
    assert "loss 1.79 (uniform), 1.7" in second
    assert second.endswith(f"accuracy {statistics.commonest_share:.2%} (commonest token)")
    assert f"{statistics.image_entropy:.2f} nats" in third


CHANGES: list[dict[str, Any]] = [
    {"format": "other"},
    {"version": 2},
    {"dataset": "0" * 64},
    {"whole": "yes"},
    {"counts": None},
    {"counts": []},
    {"counts": {}},
]
COUNTS: list[dict[str, Any]] = [
    {"tokens": [1, 2]},
    {"tokens": [[1, 2, 3, 4, 5, 6]]},
    {"tokens": [40, 1, -1, 0, 0, 0]},
    {"tokens": [39, 0, 0, 0, 0, 0]},
    {"tokens": [40.0, 0, 0, 0, 0, 0]},
    {"tokens": [10**30, 0, 0, 0, 0, 0]},
    {"tokens": [[1], [2, 3]]},
    {"tokens": "123456"},
    {"repeated": [0, 39, 0, 0, 0]},
    {"repeated": [0, 40, 0, 0]},
    {"pixels": None},
    {"pixels": [[1, 2], [3, 4], [5, 6]]},
    {"pixels": [[159, *[0] * 255], *[[160, *[0] * 255]] * 2]},
    {"samples": 10**400},
    {"samples": math.inf},
    {"samples": True},
    {"samples": "10"},
    {"commonest": 41},
    {"commonest": 9},
]


@pytest.mark.parametrize("change", [*CHANGES, *({"counts": counts} for counts in COUNTS)], ids=str)
def test_a_damaged_or_foreign_file_is_none(data: Any, change: dict[str, Any]) -> None:
    place, manifest, _ = data
    fields = json.loads(place.read(STATISTICS_NAME))
    counts = change.get("counts")
    if isinstance(counts, dict) and counts:
        change = {"counts": fields["counts"] | counts}
    place.write(STATISTICS_NAME, json.dumps(fields | change).encode())
    assert load_statistics(place, manifest) is None


@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"3", b"[" * 100_000, b"{}", None])
def test_what_is_no_json_of_ours_is_none(data: Any, content: bytes | None) -> None:
    place, manifest, _ = data
    place.remove(STATISTICS_NAME)
    if content is not None:
        place.write(STATISTICS_NAME, content)
    assert load_statistics(place, manifest) is None


def test_statistics_of_fewer_samples_are_not_of_the_whole(data: Any) -> None:
    place, manifest, _ = data
    some = tally_of(samples_of(3, 9))
    write_statistics(place, manifest, Statistics(some, whole=False))
    assert load_statistics(place, manifest) == Statistics(some, whole=False)
    for wrong in (Statistics(some, whole=True), Statistics(tally_of(samples_of(3, 11)), whole=False)):
        write_statistics(place, manifest, wrong)
        assert load_statistics(place, manifest) is None


def test_a_store_that_refuses_the_file_stops_nobody(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place, manifest, _ = data

    def refuse(self: LocalPlace, name: str) -> bytes:
        raise AccessError("s3://x: 403")  # what S3 says of a missing file to those who may not list

    monkeypatch.setattr(LocalPlace, "read", refuse)
    assert load_statistics(place, manifest) is None
