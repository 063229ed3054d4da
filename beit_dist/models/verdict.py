"""Is a tokenizer good enough to pre-train with: one word from a few numbers, the reason, and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Word = Literal["good", "usable", "poor", "collapsed"]

COLLAPSED = 0.02
"""Perplexity as a share of the vocabulary: below it, nearly all positions have the same few tokens."""
_USE: tuple[tuple[Word, float, float], ...] = (("poor", 1 / 16, 0.25), ("usable", 1 / 4, 0.10))
"""From the worst on: a verdict, with the perplexity as a share of the vocabulary, and the share of the commonest
token, past which it is given.

k-means of whole patches, which nothing trains towards an even use, comes to a perplexity of 0.6 of the vocabulary
and to 0.02 to 0.04 for the commonest token (photographs and generated pictures, 512 tokens). A quarter and a
tenth leave room for pictures with more sky. Past a sixteenth and a quarter, a position says ln 16 nats less than
it could, and a model that has learnt a single token is right one time in four.
"""
_MORE_USE = (
    "Train another one with start=clusters and encoder_lr_share=0.02, a larger usage_weight, a smaller kl_weight, "
    "a lower optimizer.lr or a smaller model.vocabulary."
)
_MORE_DETAIL = (
    "Train another one with start=clusters and encoder_lr_share=0.02, for more steps, or with more width "
    "(model.hidden)."
)


@dataclass(frozen=True)
class TokenUse:
    """How the tokens of some images are distributed."""

    vocabulary: int
    used: int
    """Tokens that occur."""
    perplexity: float
    """exp of the entropy of their frequencies."""
    commonest_share: float
    """Of the commonest token, in all positions."""
    positions: int
    """How many were counted."""

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> TokenUse:
        """From how often each token occurs, ``(V,)``."""
        positions = int(counts.sum())
        shares = counts[counts > 0] / max(1, positions)
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        return cls(len(counts), len(shares), perplexity, float(counts.max()) / max(1, positions), positions)

    def share(self, of: float) -> float:
        """A perplexity: so much of the vocabulary, or of the positions where these are fewer; 2 or more."""
        return max(2.0, of * min(self.vocabulary, self.positions))

    def __str__(self) -> str:
        return (
            f"{self.used:,} of {self.vocabulary:,} in use, perplexity {self.perplexity:,.1f}, the commonest in "
            f"{self.commonest_share:.1%} of all positions"
        )


class SingleColours(NamedTuple):
    """PSNR in dB of images whose patches of 8×8 pixels are painted in one colour each: the baselines."""

    palette: float
    """The nearest of as many colours as there are tokens: k-means of mean colours in training images."""
    mean_colour: float
    """Each patch's own mean colour, exactly: the best that single colours can do."""


class Drawn(NamedTuple):
    """How near reconstructions come to their images. PSNR in dB."""

    psnr: float
    """Of reconstructions from hard tokens."""
    colours: SingleColours
    """The baselines, on the same images."""

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.2f} dB; one colour for each patch would give {self.colours.mean_colour:.2f} dB "
            f"(mean colour) or {self.colours.palette:.2f} dB (palette)"
        )


class Verdict(NamedTuple):
    """A judgement, in words for a person."""

    word: Word
    why: str
    advice: str
    """What to change; empty where nothing needs to be."""

    def __str__(self) -> str:
        return f"{self.word}. {self.why} {self.advice}".rstrip()


def judge(use: TokenUse, drawn: Drawn | None = None, least_perplexity: float | None = None) -> Verdict:
    """The verdict on a tokenizer.

    Counts alone can condemn tokens and cannot praise them: random ones would be used evenly. So without ``drawn``
    the best verdict is ``usable``.

    Args:
        use: of its tokens; best on images it was not trained on.
        drawn: of the same images.
        least_perplexity: below which the codebook counts as collapsed; by default a share of the vocabulary.
    """
    least = use.share(COLLAPSED) if least_perplexity is None else least_perplexity
    if use.perplexity < least:
        why = f"Nearly all positions have the same few tokens (perplexity below {least:.1f}): they teach nothing."
        return Verdict("collapsed", why, f"Do not pre-train with it. {_MORE_USE}")
    if drawn is not None and drawn.psnr <= drawn.colours.palette:
        why = "Its reconstructions are no better than a palette's: the tokens say little more than colours."
        return Verdict("poor", why, _MORE_DETAIL)
    for word, perplexity, commonest in _USE:
        if use.perplexity < use.share(perplexity) or use.commonest_share > commonest:
            return Verdict(word, "A few tokens stand for most of the images.", _MORE_USE)
    if drawn is None:
        why = "The tokens are well used; what they say about the images was not measured."
        return Verdict("usable", why, "See what they redraw: --tokenizer FILE, with its decoder.")
    if drawn.psnr <= drawn.colours.mean_colour:
        why = "The tokens are well used, and say only a little more than colours."
        return Verdict("usable", why, _MORE_DETAIL)
    return Verdict("good", "The tokens are well used, and say more than colours.", "")
