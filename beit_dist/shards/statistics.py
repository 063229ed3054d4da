"""What a data set's tokens and pixels are like, in counts: ``statistics.json``, beside the manifest.

From them come the baselines: what a model scores that has looked at no image. The file is shown and never trusted
for anything else; the manifest's digest does not depend on it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import UserError
from beit_dist.shards.manifest import Manifest
from beit_dist.shards.sample import SampleLayout
from beit_dist.storage.access import Access
from beit_dist.storage.opening import as_place
from beit_dist.storage.place import Place

STATISTICS_NAME = "statistics.json"
FORMAT = "beit_dist statistics"
FORMAT_VERSION = 1

_ARRAYS = ("tokens", "repeated", "pixels")
_NUMBERS = ("samples", "commonest")
PATCHES_APART = 5
"""Pixels are counted in every so many patches: the same picture of a data set in a fifth of the time."""


@dataclass
class Tally:
    """Counts of samples: of a shard, of a data set. They can be added, and as all are integers, in any order.

    Shapes: V vocabulary, P tokens of a sample.
    """

    tokens: NDArray[np.int64]
    """(V,), how often each token occurs."""
    repeated: NDArray[np.int64]
    """(P + 1,), by c: how many pairs of a sample and a token there are where the sample has the token c times."""
    pixels: NDArray[np.int64]
    """(3, 256), how often each value occurs in each channel, in every :data:`PATCHES_APART`-th patch."""
    samples: int = 0
    commonest: int = 0
    """Sum over the samples of how often each has its own commonest token."""

    @classmethod
    def empty(cls, layout: SampleLayout) -> Tally:
        """Of no samples."""
        tokens, repeated = (np.zeros(size, np.int64) for size in (layout.vocabulary, layout.patches + 1))
        return cls(tokens, repeated, np.zeros((3, 256), np.int64))

    def add(self, tokens: NDArray[Any], patches: NDArray[np.uint8]) -> None:
        """Count a sample in.

        Args:
            tokens: integers in [0, V) of any shape, P in all.
            patches: uint8 (P, 3 · patch_size²), with the channel last.
        """
        counts = np.bincount(tokens.reshape(-1), minlength=len(self.tokens))
        self.tokens += counts
        self.repeated += np.bincount(counts[counts > 0], minlength=len(self.repeated))
        self.commonest += int(counts.max())
        self.pixels += _levels(patches[::PATCHES_APART])
        self.samples += 1

    def __iadd__(self, other: Tally) -> Tally:
        for name in (*_ARRAYS, *_NUMBERS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tally) and self.to_json() == other.to_json()

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return numbers | {name: getattr(self, name).tolist() for name in _ARRAYS}

    @classmethod
    def from_json(cls, fields: Any, layout: SampleLayout) -> Tally:
        """The reverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: these are no counts of samples of this layout.
        """
        empty = cls.empty(layout)
        arrays = {name: np.array(fields[name]) for name in _ARRAYS}
        numbers = {name: fields[name] for name in _NUMBERS}
        for name, counts in arrays.items():
            if counts.dtype != np.int64 or counts.shape != getattr(empty, name).shape or counts.min() < 0:
                raise ValueError(f"{name} are no counts")
        for name, count in numbers.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} is no count")
        samples, times = numbers["samples"], np.arange(layout.patches + 1)
        total, looked_at = samples * layout.patches, -(-layout.patches // PATCHES_APART) * layout.patch_size**2
        if (
            not total == arrays["tokens"].sum() == (arrays["repeated"] * times).sum()
            or set(arrays["pixels"].sum(1).tolist()) != {samples * looked_at}
            or not samples <= numbers["commonest"] <= total
        ):
            raise ValueError("the counts contradict one another")
        for name, value in (arrays | numbers).items():
            setattr(empty, name, value)
        return empty


@dataclass(frozen=True)
class Statistics:
    """A data set's counts, and what follows from them."""

    tally: Tally
    whole: bool
    """Whether all samples of all views were counted, and not some of them."""

    @property
    def entropy(self) -> float:
        """Of the tokens' frequencies, in nats: the loss of a model that knows these and nothing else."""
        return entropy_of(self.tally.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the entropy: how many tokens are in use, weighted by how evenly."""
        return math.exp(self.entropy)

    @property
    def used(self) -> int:
        """Tokens that occur."""
        return int((self.tally.tokens > 0).sum())

    @property
    def commonest_token(self) -> int:
        """The token that occurs most often; the lowest of several."""
        return int(self.tally.tokens.argmax())

    @property
    def commonest_share(self) -> float:
        """Of the commonest token: the accuracy of always answering it."""
        return self.share_of(self.commonest_token)

    def share_of(self, token: int) -> float:
        """Of a token among all: the accuracy of always answering it."""
        return float(self.tally.tokens[token] / max(1, self.tally.tokens.sum()))

    def cross_entropy(self, train: Statistics) -> float:
        """Nats per token of this data set, for a model that knows the frequencies of another and nothing else.

        Args:
            train: of the data set with the same vocabulary whose frequencies the model knows. One is added to each
                of its counts, as a token that does not occur there may occur here.
        """
        counts = train.tally.tokens + 1
        shares = self.tally.tokens / max(1, self.tally.tokens.sum())
        return float(-(shares * np.log(counts / counts.sum())).sum())

    @property
    def image_entropy(self) -> float:
        """The mean over the images of the entropy of an image's own tokens, in nats."""
        positions, repeated = len(self.tally.repeated) - 1, self.tally.repeated
        times = np.arange(1, positions + 1)
        summed = float((repeated[1:] * times * np.log(times)).sum())
        return max(0.0, math.log(positions) - summed / (max(1, self.tally.samples) * positions))

    @property
    def image_commonest_share(self) -> float:
        """The mean over the images of the share of an image's own commonest token."""
        positions = len(self.tally.repeated) - 1
        return self.tally.commonest / (max(1, self.tally.samples) * positions)

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """By channel, in units of 0..1."""
        return tuple(self._moment(1).tolist())

    @property
    def pixel_deviation(self) -> tuple[float, ...]:
        """By channel, in units of 0..1."""
        variance = self._moment(2) - self._moment(1) ** 2
        return tuple(np.sqrt(np.maximum(0.0, variance)).tolist())

    def _moment(self, power: int) -> NDArray[np.float64]:
        values, pixels = (np.arange(256) / 255) ** power, self.tally.pixels
        return np.asarray((pixels * values).sum(1) / np.maximum(1, pixels.sum(1)), np.float64)

    def to_bytes(self, manifest: Manifest) -> bytes:
        """Content of ``statistics.json``: what follows from the counts first, for people; then the counts."""
        fields = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dataset": manifest.digest,
            "whole": self.whole,
            "entropy_nats": self.entropy,
            "perplexity": self.perplexity,
            "used": self.used,
            "commonest_token": self.commonest_token,
            "commonest_share": self.commonest_share,
            "image_entropy_nats": self.image_entropy,
            "image_commonest_share": self.image_commonest_share,
            "pixel_mean": self.pixel_mean,
            "pixel_deviation": self.pixel_deviation,
            "counts": self.tally.to_json(),
        }
        return (json.dumps(fields).replace(', "', ',\n "') + "\n").encode()


def _levels(patches: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(3, 256): how often each value occurs in each channel; Pillow takes a third of the time that NumPy does."""
    from PIL import Image

    pixels = patches.size // 3
    image = Image.frombuffer("RGB", (pixels, 1), np.ascontiguousarray(patches), "raw", "RGB", 0, 1)
    return np.array(image.histogram(), np.int64).reshape(3, 256)


def entropy_of(counts: NDArray[np.int64]) -> float:
    """Of frequencies, in nats."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def load_statistics(
    where: str | os.PathLike[str] | Place, manifest: Manifest, access: Access | None = None
) -> Statistics | None:
    """The statistics of a data set; None where there are none that can be read, or they are not of this data set.

    A store that does not answer, or refuses, is no reason to stop: nothing depends on them.
    """
    place = as_place(where, access)
    try:
        fields = json.loads(place.read(STATISTICS_NAME))
        if (fields["format"], fields["version"]) != (FORMAT, FORMAT_VERSION) or fields[
            "dataset"
        ] != manifest.digest:
            return None
        tally = Tally.from_json(fields["counts"], manifest.layout)
        whole, every = fields["whole"], manifest.samples * manifest.views
        if type(whole) is not bool or not 0 < tally.samples <= every or (whole and tally.samples < every):
            return None
        return Statistics(tally, whole)
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_statistics(place: Place, manifest: Manifest, statistics: Statistics) -> None:
    """Write ``statistics.json``; its manifest may come later."""
    place.write(STATISTICS_NAME, statistics.to_bytes(manifest))


def keep_statistics(place: Place, manifest: Manifest, counted: Statistics) -> tuple[Statistics, str]:
    """The data set's statistics; where it has none, or of fewer samples, those just counted are written to it.

    Returns:
        The statistics of the most samples, and what was done about the file, for a person; empty if nothing.
    """
    there = load_statistics(place, manifest)
    if there is not None and there.tally.samples >= counted.tally.samples:
        return there, ""
    try:
        write_statistics(place, manifest, counted)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        return counted, f"{place / STATISTICS_NAME}: cannot be written ({reason}), so runs show no baselines"
    return counted, f"wrote {place / STATISTICS_NAME}, from which runs take their baselines"


def problem_with(place: Place, manifest: Manifest, tally: Tally) -> str:
    """What is wrong with the statistics beside a manifest, and the way out; empty if nothing.

    It is no fault of the data set: training reads the same samples with the wrong statistics.

    Args:
        tally: of all samples.
    """
    file, there = place / STATISTICS_NAME, load_statistics(place, manifest)
    if there is None:
        return f"{file}: none of this data set, so runs show no baselines. Run beit inspect {place}"
    if there.whole and there.tally != tally:
        return (
            f"{file}: its counts are not those of the samples, so runs show wrong baselines. Remove it and run "
            f"beit inspect {place}"
        )
    return ""


def lines(statistics: Statistics) -> list[str]:
    """For a person: how the tokens are used, and what a model scores that has looked at no image."""
    tally, vocabulary = statistics.tally, len(statistics.tally.tokens)
    counted = f"{tally.samples:,} samples" if statistics.whole else f"{tally.samples:,} of the samples"
    return [
        f"tokens in {counted}: {statistics.used:,} of {vocabulary:,} in use, "
        f"perplexity {statistics.perplexity:,.1f}",
        f"baselines without looking at an image: loss {math.log(vocabulary):.2f} (uniform), "
        f"{statistics.entropy:.2f} (frequency); accuracy {statistics.commonest_share:.2%} (commonest token)",
        f"within the average image: entropy {statistics.image_entropy:.2f} nats, commonest token "
        f"{statistics.image_commonest_share:.2%}",
    ]
