"""Where a loaded model is from: a run, or a file of ours, of Hugging Face, timm or unilm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What is known of a loaded model besides its weights."""

    name: str
    """For a person: the source, the checkpoint, and whether the weights are averaged."""
    kind: str
    """``pretraining``, ``classification`` or ``segmentation``."""
    digest: str
    """Of the weights as they were stored: features and predictions depend on it and on the settings."""
    notes: tuple[str, ...] = ()
    """What was assumed, in words, because the source does not say it, and what was left out."""
    recipe: dict[str, Any] | None = None
    """Of a run: its resolved settings."""
    tokenizer: str | None = None
    """Of a pre-training run: the digest of the tokenizer whose tokens it predicts."""
