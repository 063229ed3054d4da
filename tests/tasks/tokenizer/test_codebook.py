"""The codebook's use is told from the tokens of all ranks, and a collapse is noticed and named."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from beit_dist.config.reading import validate
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.models.verdict import TokenUse, judge
from beit_dist.tasks.tokenizer.codebook import Codebook

VOCABULARY = 100


def recipe(**collapse: Any) -> TokenizerConfig:
    settings = {"below": 0.05, "after_steps": 10, "for_steps": 20} | collapse
    return validate(
        TokenizerConfig, {"run": "r", "model": {"vocabulary": VOCABULARY}, "steps": 1000, "collapse": settings}
    )


def counts(used: int) -> np.ndarray:
    """Of a step in which so many tokens are used alike."""
    found = np.zeros(VOCABULARY, np.int64)
    found[:used] = 7
    return found


def fed(codebook: Codebook, used: int, steps: range) -> Codebook:
    for step in steps:
        codebook.take(step, counts(used))
    return codebook


def test_perplexity_and_dead_tokens_follow_the_use() -> None:
    codebook = fed(Codebook(recipe()), 80, range(1, 400))
    assert codebook.perplexity == pytest.approx(80)
    assert codebook.dead == 20
    fed(codebook, 10, range(400, 1500))
    assert codebook.perplexity == pytest.approx(10, rel=1e-3)
    assert codebook.dead == 90


def test_a_token_is_dead_after_two_hundred_steps_without_use() -> None:
    codebook = Codebook(recipe())
    codebook.take(1, np.ones(VOCABULARY, np.int64))
    assert fed(codebook, 1, range(2, 201)).dead == 0
    assert fed(codebook, 1, range(201, 203)).dead == VOCABULARY - 1


def test_the_alarm_needs_low_use_for_long_after_the_first_steps() -> None:
    codebook = fed(Codebook(recipe()), 2, range(1, 30))  # judged from step 11 on
    assert not codebook.alarm
    assert fed(codebook, 2, range(30, 31)).alarm
    recovered = fed(fed(Codebook(recipe()), 2, range(1, 30)), VOCABULARY, range(30, 40))
    assert not fed(recovered, 2, range(40, 45)).alarm, "it counts from the last good step"
    assert not fed(Codebook(recipe(below=None)), 1, range(1, 900)).alarm


def test_by_default_it_is_judged_once_the_kl_weight_has_risen() -> None:
    chosen = validate(TokenizerConfig, {"run": "r", "steps": 1000, "model": {"vocabulary": 512}})
    assert (chosen.judged_after, chosen.collapse_patience) == (250, 50)
    assert chosen.least_perplexity == pytest.approx(10.24)
    long = validate(TokenizerConfig, {"run": "r", "steps": 3_000_000, "kl_warmup_steps": 5000})
    assert (long.judged_after, long.collapse_patience) == (5000, 2000)


def test_the_message_names_what_to_change_with_its_values() -> None:
    alarm = str(fed(Codebook(recipe()), 2, range(1, 31)).alarm)
    assert re.search(r"usage_weight \(0\), a smaller kl_weight \(6.6\)", alarm)
    assert "at step 30 the perplexity of 100 tokens is 2.0, and has been below 5.0 for 20 steps" in alarm


def test_a_continued_codebook_judges_like_one_that_never_stopped() -> None:
    whole = fed(Codebook(recipe()), 3, range(1, 25))
    saved = json.loads(json.dumps(fed(Codebook(recipe()), 3, range(1, 20)).state))
    cut = fed(Codebook(recipe(), saved), 3, range(20, 25))
    assert (cut.perplexity, cut.state) == (whole.perplexity, whole.state)


def test_an_alarm_once_raised_stays_through_a_restart_unless_it_is_overruled() -> None:
    collapsed = fed(fed(Codebook(recipe()), 2, range(1, 31)), VOCABULARY, range(31, 60))
    saved = json.loads(json.dumps(collapsed.state))
    assert "at step 30" in str(Codebook(recipe(), saved).alarm)
    assert Codebook(recipe(below=None), saved).alarm is None


def test_one_setting_says_what_is_collapsed_in_training_and_in_what_is_written() -> None:
    use = TokenUse(VOCABULARY, used=60, perplexity=30.0, commonest_share=0.05, positions=1000)
    for below, collapsed in [(0.4, True), (0.2, False), (None, False)]:
        chosen = recipe(below=below)
        alarm = fed(Codebook(chosen), 30, range(1, 31)).alarm
        word = judge(use, None, chosen.least_perplexity).word
        assert (bool(alarm), word == "collapsed") == (collapsed, collapsed), below


def test_null_never_stops_but_judges_as_the_default_does() -> None:
    use = TokenUse(VOCABULARY, used=60, perplexity=1.0, commonest_share=0.05, positions=1000)
    for below, stopped in ((None, False), (0.02, True)):
        chosen = recipe(below=below)
        assert (fed(Codebook(chosen), 1, range(1, 31)).alarm is not None) is stopped
        assert judge(use, None, chosen.least_perplexity).word == "collapsed"
