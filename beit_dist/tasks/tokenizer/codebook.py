"""Is the codebook in use: perplexity and dead tokens of the steps so far, and when to give up.

A dVAE can learn to describe every position by the same few tokens; its decoder then draws grey, and no model
learns anything from such tokens. It does not recover by itself, so the training is stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.tokenizer import TokenizerConfig

_KEPT = 0.98
"""How much of the running counts a step keeps: they speak of about the last 50 steps."""
_DEAD = _KEPT**200
"""Running counts below this: a token that was likeliest nowhere in 200 steps or more."""


class Codebook:
    """Running counts of the tokens that were likeliest somewhere, over all ranks. Kept by rank 0.

    Args:
        config: when the codebook counts as collapsed.
        saved: ``state`` of the checkpoint that is continued.
    """

    def __init__(self, config: TokenizerConfig, saved: Mapping[str, Any] | None = None) -> None:
        vocabulary = config.model.vocabulary
        saved = saved or {"counts": [0.0] * vocabulary, "low_steps": 0}
        self._config = config
        self._counts = np.array(saved["counts"], dtype=np.float64)
        self._low_steps = int(saved["low_steps"])
        self._alarm: str | None = saved.get("alarm") if config.collapse.below is not None else None

    @property
    def state(self) -> dict[str, Any]:
        """For the manifest: a run that is continued from it judges like one that never stopped."""
        return {"counts": self._counts.tolist(), "low_steps": self._low_steps, "alarm": self._alarm}

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the tokens' frequencies: how many are in use, weighted by how evenly."""
        share = self._counts / max(self._counts.sum(), 1e-300)
        used = share[share > 0]
        return float(np.exp(-(used * np.log(used)).sum()))

    @property
    def dead(self) -> int:
        """Tokens that were likeliest nowhere in about the last 200 steps."""
        return int((self._counts < _DEAD).sum())

    def take(self, step: int, counts: NDArray[np.int64]) -> None:
        """Count in a step's tokens, ``(V,)`` over all ranks."""
        self._counts = _KEPT * self._counts + counts
        config = self._config
        judged = config.collapse.below is not None and step > config.judged_after
        self._low_steps = self._low_steps + 1 if judged and self.perplexity < config.least_perplexity else 0
        if self._low_steps >= config.collapse_patience and self._alarm is None:
            self._alarm = self._collapsed(step)

    @property
    def alarm(self) -> str | None:
        """Why the training is to be stopped, once the codebook has collapsed."""
        return self._alarm

    def _collapsed(self, step: int) -> str:
        config = self._config
        return (
            f"the codebook has collapsed: at step {step} the perplexity of {config.model.vocabulary:,} tokens is "
            f"{self.perplexity:.1f}, and has been below {config.least_perplexity:.1f} for {self._low_steps} "
            "steps. It does not recover by itself. Start again, in another run folder, with a larger usage_weight "
            f"({config.usage_weight:g}), a smaller kl_weight "
            f"({config.kl_weight:g}), a longer kl_warmup_steps ({config.kl_rise}), a lower optimizer.lr "
            f"({config.optimizer.lr:g}) or a smaller model.vocabulary; collapse.below=null trains on anyway"
        )
