"""Is the codebook in use: perplexity and dead tokens as training goes on, and when to give up.

A dVAE can learn to describe every position by the same few tokens; its decoder then draws grey, and no model
learns anything from such tokens. It does not recover by itself, so the training is stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.engine.distributed import Agreement
from beit_dist.errors import TrainingError
from beit_dist.tokenizer_config import TokenizerRecipe

_KEPT = 0.98
"""How much of the running counts a step keeps: they speak of about the last 50 steps."""
_DEAD = _KEPT**200
"""Running counts below this: a token that was likeliest nowhere in 200 steps or more."""


class Codebook:
    """Running counts of the tokens that were likeliest somewhere, over all ranks. Kept by rank 0.

    Args:
        recipe: when the codebook counts as collapsed.
        saved: ``state`` of the checkpoint that is continued.
    """

    def __init__(self, recipe: TokenizerRecipe, saved: Mapping[str, Any] | None = None) -> None:
        vocabulary = recipe.model.vocabulary
        saved = saved or {"counts": [0.0] * vocabulary, "low_steps": 0}
        self._recipe = recipe
        self._counts = np.array(saved["counts"], dtype=np.float64)
        self._low_steps = int(saved["low_steps"])
        self._step = 0

    @property
    def state(self) -> dict[str, Any]:
        """For the manifest: a run that is continued from it judges like one that never stopped."""
        return {"counts": self._counts.tolist(), "low_steps": self._low_steps}

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
        self._step = step
        self._counts = _KEPT * self._counts + counts
        recipe = self._recipe
        judged = recipe.collapse.below is not None and step > recipe.judged_after
        self._low_steps = self._low_steps + 1 if judged and self.perplexity < recipe.least_perplexity else 0

    @property
    def alarm(self) -> bool:
        """Whether the codebook has collapsed, and the training is to be stopped for it."""
        return self._low_steps >= self._recipe.collapse_patience

    def stop(self, agreement: Agreement) -> None:
        """Stop all ranks for the alarm of rank 0. Collective.

        Raises:
            TrainingError: always.
        """
        recipe = self._recipe
        text = (
            f"the codebook has collapsed: at step {self._step} the perplexity is {self.perplexity:.1f} of "
            f"{recipe.model.vocabulary} tokens, for {self._low_steps} steps now below "
            f"{recipe.least_perplexity:.1f}. It does not recover by itself. Start anew, in another run "
            f"folder, with a larger usage_weight ({recipe.usage_weight:g}), a smaller kl_weight "
            f"({recipe.kl_weight:g}), a longer kl_warmup_steps ({recipe.kl_rise}), a lower lr ({recipe.lr:g}) or "
            f"a smaller model.vocabulary; collapse.below=null trains on nevertheless"
        )
        raise TrainingError(agreement.from_rank_0(text))
