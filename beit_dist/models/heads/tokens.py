"""The head of BEiT: which visual token a masked patch is (arXiv 2106.08254, section 2.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.models.guessing import guesses
from beit_dist.models.heads.base import LOSS, Counts, Head
from beit_dist.models.heads.cross_entropy import cross_entropy_and_ranks
from beit_dist.step_numbers import Baseline, Baselines, Number

PADDING = -100
"""Target of positions that are padding: any negative number."""
_FEW = 5


class TokensHead(Head):
    """Cross-entropy over the vocabulary of visual tokens."""

    name = "lm_head"  # unilm's
    numbers = (
        LOSS,
        Number(
            name="accuracy",
            help="Share of the masked patches whose token was predicted correctly.",
            metric="beit_train_accuracy_ratio",
            held_out="beit_validation_accuracy_ratio",
            text="accuracy {:.1%}",
            better="higher",
        ),
        Number(
            name="top5_accuracy",
            help="Share of the masked patches whose token is among the five most likely ones.",
            metric="beit_train_top5_accuracy_ratio",
            held_out="beit_validation_top5_accuracy_ratio",
            better="higher",
        ),
    )
    settings = frozenset({"vocabulary"})
    shared_with_shards = (*Head.shared_with_shards, "vocabulary")
    exports = frozenset({"hf", "unilm"})

    @classmethod
    def outputs(cls, config: ModelConfig) -> int:
        """A logit for each token."""
        return config.vocabulary

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        """A choice among so many."""
        return f"which of {config.vocabulary} visual tokens a masked patch is; cross-entropy"

    @classmethod
    def baselines(cls, config: ModelConfig, known: Counts | None, scored: Counts | None = None) -> Baselines:
        """See :func:`beit_dist.models.guessing.guesses`."""
        if known is None:
            return {"loss": [Baseline("uniform", math.log(config.vocabulary))]}
        return guesses(known.tokens, None if scored is None else scored.tokens, "token", "tokens")

    def score(self, predicted: Tensor, patches: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Cross-entropy in nats, right guesses, and right ones among the five most likely.

        A token is among these if fewer than five are more likely. So of tokens that are equally likely all count,
        which ``topk`` leaves to chance; and where a logit is not a number, none.
        """
        wanted = tokens.long().gather(1, positions.long().clamp(min=0))
        targets = torch.where(positions < 0, PADDING, wanted).flatten()
        return cross_entropy_and_ranks(predicted.flatten(0, 1), targets, _FEW)

    @classmethod
    def activation_bytes(cls, config: ModelConfig, masked: int, size: int) -> int:
        """Predictions, and their gradient, which takes their place."""
        return masked * cls.outputs(config) * 2 * size
