"""The verdict on a tokenizer, and where its borders are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from beit_dist.models.verdict import Drawn, SingleColours, TokenUse, judge

COLOURS = SingleColours(palette=22.0, mean_colour=23.0)


def use(**changes: Any) -> TokenUse:
    """Of 512 tokens, well used."""
    told = {"vocabulary": 512, "used": 400, "perplexity": 250.0, "commonest_share": 0.03, "positions": 12_544}
    return TokenUse(**(told | changes))


@pytest.mark.parametrize(
    ("changes", "psnr", "word", "names"),
    [
        ({}, 23.5, "good", ""),
        ({}, 23.0, "usable", "more steps"),  # no better than exact colours
        ({}, 22.0, "poor", "model.hidden"),  # no better than a table of colours
        ({"perplexity": 127.0}, 23.5, "usable", "usage_weight"),  # below a quarter
        ({"commonest_share": 0.11}, 23.5, "usable", "usage_weight"),
        ({"perplexity": 31.0}, 23.5, "poor", "usage_weight"),  # below a sixteenth
        ({"commonest_share": 0.26}, 23.5, "poor", "usage_weight"),
        ({"perplexity": 10.0}, 30.0, "collapsed", "kl_weight"),  # below 2 %
        ({}, None, "usable", "--tokenizer"),  # counts alone cannot praise
        ({"perplexity": 31.0}, None, "poor", "usage_weight"),
        ({"perplexity": 9.0}, None, "collapsed", "kl_weight"),
        ({"vocabulary": 8192, "perplexity": 60.0, "used": 80, "positions": 100}, 23.5, "good", ""),
    ],
)
def test_every_verdict_has_its_reason(changes: dict[str, Any], psnr: float | None, word: str, names: str) -> None:
    verdict = judge(use(**changes), None if psnr is None else Drawn(psnr, COLOURS))
    assert verdict.word == word
    assert names in verdict.advice
    assert bool(verdict.advice) == (word != "good")


def test_the_recipe_may_say_what_is_collapsed() -> None:
    assert judge(use(perplexity=40.0), Drawn(23.5, COLOURS), least_perplexity=50.0).word == "collapsed"


def test_the_numbers_are_said_in_words() -> None:
    assert str(use()) == "400 of 512 in use, perplexity 250.0, the commonest in 3.0% of all positions"
    assert "23.50 dB" in str(Drawn(23.5, COLOURS))


def test_the_use_of_tokens_follows_from_their_counts() -> None:
    even = TokenUse.of(np.array([5, 5, 5, 5, 0, 0]))
    assert even == TokenUse(6, 4, pytest.approx(4), 0.25, 20)  # type: ignore[arg-type]
    assert TokenUse.of(np.array([9, 0, 0])) == TokenUse(3, 1, 1.0, 1.0, 9)
