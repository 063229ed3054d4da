"""What is known of classes, tokens among them, without a look at an image: how often each occurs."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from beit_dist.step_numbers import Baseline, Baselines

_FEW = 5
Counts = NDArray[np.int64] | NDArray[np.float64]


def guesses(known: Counts, scored: Counts | None, one: str, several: str) -> Baselines:
    """Baselines of ``loss`` (cross-entropy in nats), ``accuracy`` and ``top5_accuracy``.

    ``uniform``: all alike. ``frequency``: the frequencies of ``known``, for every answer. ``commonest``: always
    what is commonest in ``known``, or its five.

    Args:
        known: how often each class occurs in the training data, which an answer may rely on.
        scored: the same, or shares, of what is answered for; None for the training data itself. Each count of
            ``known`` is then one more, or a class that training never saw would cost infinitely much.
        one: what a class is called.
        several: the same of more than one.
    """
    uniform = Baseline("uniform", math.log(len(known)))
    if not known.sum() or (scored is not None and not scored.sum()):
        return {"loss": [uniform]}
    answers = known + (scored is not None)
    asked = known if scored is None else scored
    shares = asked / asked.sum()
    there = shares > 0
    frequency = -float((shares[there] * np.log(answers[there] / answers.sum())).sum())
    commonest = np.argsort(-known, kind="stable")[:_FEW]
    return {
        "loss": [uniform, Baseline("frequency", frequency)],
        "accuracy": [Baseline(f"commonest {one}", float(shares[commonest[0]]))],
        "top5_accuracy": [Baseline(f"five commonest {several}", float(shares[commonest].sum()))],
    }
