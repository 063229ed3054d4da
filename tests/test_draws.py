"""Keyed draws: the same for ever, independent between keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from beit_dist.draws import Purpose, below, below_each, permutation, uniforms, words, words_of


def test_the_words_are_pinned() -> None:
    assert [hex(word) for word in words(0, Purpose.MASK, (), 2).tolist()] == WORDS_0
    assert [hex(word) for word in words(2**63 - 1, Purpose.DROP_PATH, (3, 12345678901), 2).tolist()] == WORDS_1


def test_the_words_are_those_of_a_fresh_philox() -> None:
    for count in (1, 3, 4, 65):  # counts that leave words in a generator's buffer
        counter, key = np.array([0, 7, 2**64 - 1, 0], np.uint64), np.array([5, Purpose.FLIP], np.uint64)
        expected = np.random.Philox(counter=counter, key=key).random_raw(count)
        assert words(5, Purpose.FLIP, (7, -1), count).tolist() == expected.tolist()


def test_threads_draw_what_one_thread_draws() -> None:
    expected = [words(1, Purpose.MASK, (n,), 500).tolist() for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda n: words(1, Purpose.MASK, (n,), 500).tolist(), range(200)))
    assert drawn == expected


def test_the_numbers_of_the_purposes_of_labelled_images_are_pinned() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose if 15 <= purpose <= 18} == {
        "LABELLED_ORDER": 15,
        "LABELLED_VIEW": 16,
        "AUGMENTATION": 17,
        "ERASING": 18,
    }


def test_the_numbers_of_the_purposes_are_pinned() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose if purpose <= 9} == {
        "SOURCE_ORDER": 1,
        "CROP": 2,
        "FLIP": 3,
        "JITTER": 4,
        "BLOCK_ORDER": 5,
        "WINDOW_ORDER": 6,
        "MASK": 7,
        "MASK_TOP_UP": 8,
        "DROP_PATH": 9,
    }


def test_more_words_of_a_key_begin_with_the_same_words() -> None:
    few, many = (words(5, Purpose.CROP, (1, 2, 3), count) for count in (3, 1000))
    assert few.tolist() == many[:3].tolist()


def test_seed_purpose_and_every_part_of_the_key_count() -> None:
    draws = [
        words(seed, purpose, key, 4).tolist()
        for seed, purpose, key in [
            (0, Purpose.MASK, (0, 0)),
            (1, Purpose.MASK, (0, 0)),
            (0, Purpose.CROP, (0, 0)),
            (0, Purpose.MASK, (1, 0)),
            (0, Purpose.MASK, (0, 1)),
            (0, Purpose.MASK, (0, 0, 1)),
            (0, Purpose.MASK, (2**40, 0)),
        ]
    ]
    flat = [word for draw in draws for word in draw]
    assert len(set(flat)) == len(flat)


def test_long_draws_of_neighbouring_keys_do_not_overlap() -> None:
    first, second = (words(0, Purpose.BLOCK_ORDER, (epoch,), 5000) for epoch in (0, 1))
    assert not set(first.tolist()) & set(second.tolist())


def test_a_key_is_at_most_three_integers() -> None:
    with pytest.raises(ValueError, match="at most 3"):
        words(0, Purpose.MASK, (1, 2, 3, 4), 1)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_words_of_many_keys_are_those_of_each(parts: int, count: int) -> None:
    columns = np.random.default_rng(0).integers(-(2**62), 2**62, (parts, 20))
    drawn = words_of(-7, Purpose.CROP, tuple(columns), count)
    assert drawn.shape == (20, count)
    words(1, Purpose.MASK, (1, 2, 3), 5)  # leaves nothing behind
    for row, key in zip(drawn, columns.T.tolist(), strict=True):
        assert row.tolist() == words(-7, Purpose.CROP, tuple(key), count).tolist()


def test_no_keys_have_no_words_and_columns_are_as_long_as_each_other() -> None:
    none = np.zeros(0, np.int64)
    assert words_of(0, Purpose.CROP, (none, none), 4).shape == (0, 4)
    with pytest.raises(ValueError, match="shorter"):
        words_of(0, Purpose.CROP, (np.arange(3), np.arange(2)), 4)
    with pytest.raises(ValueError, match="at most 3"):
        words_of(0, Purpose.CROP, (none,) * 4, 4)


def test_below_each_is_below_of_each() -> None:
    raw = np.concatenate([words(0, Purpose.MASK, (), 500), np.array([0, 2**64 - 1, 2**32 - 1, 2**32], np.uint64)])
    for bound in (1, 7, 2**20 + 1, 2**32 - 1):
        got = below_each(raw, np.full(len(raw), bound, np.uint64))
        assert got.tolist() == [below(word, bound) for word in raw.tolist()]


def test_uniforms_lie_in_the_half_open_unit_interval() -> None:
    assert uniforms(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0.0, 1 - 2**-53]
    assert abs(uniforms(words(0, Purpose.MASK, (), 20_000)).mean() - 0.5) < 0.01


def test_a_permutation_is_one_and_is_pinned() -> None:
    assert sorted(permutation(3, Purpose.WINDOW_ORDER, (1, 2, 3), 257).tolist()) == list(range(257))
    assert permutation(3, Purpose.WINDOW_ORDER, (1, 2, 3), 8).tolist() == PERMUTATION


def test_below_covers_its_range_evenly() -> None:
    assert below(0, 7) == 0
    assert below(2**64 - 1, 7) == 6
    counts = np.bincount([below(word, 7) for word in words(0, Purpose.MASK, (), 14_000).tolist()], minlength=7)
    assert abs(counts - 2000).max() < 200


WORDS_0 = ["0x95a18aeacfc3464e", "0xe415d85b0b500ec5"]
WORDS_1 = ["0x44495acb17e3feb9", "0xdf74ed731d0c6202"]
PERMUTATION = [5, 6, 2, 1, 4, 3, 0, 7]
