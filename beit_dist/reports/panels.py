"""What a model paints into masked patches: images, their masks, and tokens decoded back into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from beit_dist.data.masking import MaskGenerator
from beit_dist.data.sample import NPY_HEADER, decode_head, parse_key, sample_crc
from beit_dist.data.shards import Manifest
from beit_dist.data.storage import ShardReader
from beit_dist.errors import ConfigError, SampleError, TokenizerError
from beit_dist.models.mim import MaskedImageModel
from beit_dist.visual_tokens.dvae import DVAE
from beit_dist.visual_tokens.weights import digests_of

Pixels = NDArray[np.uint8]

_GREY = 160
"""What masked patches are painted with."""


@dataclass(frozen=True)
class ShardSample:
    """A sample as it lies in a shard."""

    sample_id: int
    patches: Pixels
    """(P, patch_size² · 3)"""
    tokens: NDArray[np.int16]
    """(P,)"""


@dataclass(frozen=True)
class Reconstruction:
    """One sample's column of the panel; pictures are (height, width, 3) uint8."""

    sample_id: int
    hidden: NDArray[np.bool_]
    """(grid, grid), which patches are masked."""
    image: Pixels
    masked: Pixels
    """The image with its masked patches in grey: what the model sees."""
    from_tokens: Pixels
    """Decoded from the true tokens: the most that a perfect prediction could show."""
    from_predictions: Pixels
    """Decoded from the true tokens where visible, and the most likely ones where masked."""
    correct: int
    """Masked patches whose most likely token is the true one."""
    count: int
    """Masked patches."""


def read_samples(reader: ShardReader, manifest: Manifest, count: int) -> list[ShardSample]:
    """Up to ``count`` samples spread evenly over the data set's first view.

    Raises:
        SampleError: a sample is damaged.
    """
    count = min(count, manifest.samples)
    wanted = [index * manifest.samples // count for index in range(count)]
    samples = []
    first = 0
    for shard in manifest.view_shards(0):
        rows = [index - first for index in wanted if first <= index < first + shard.samples]
        samples += [_read_sample(reader, manifest, shard.name, row) for row in rows]
        first += shard.samples
    return samples


def check_fit(model: MaskedImageModel, dvae: DVAE, manifest: Manifest) -> None:
    """Refuse a model, a tokenizer and shards that do not belong together.

    Raises:
        ConfigError: the shards have another shape than the model's images.
        TokenizerError: the shards' tokens come from another tokenizer, or it has no decoder.
    """
    dvae.whole_decoder()
    for name in ("image_size", "patch_size", "vocabulary"):
        got, expected = getattr(manifest.layout, name), getattr(model.config, name)
        if got != expected:
            raise ConfigError(
                f"data: {name}",
                got,
                f"the run's {expected}",
                "Name the shards the run was trained on with --data.",
            )
    check_tokenizer(dvae, manifest)


def check_tokenizer(dvae: DVAE, manifest: Manifest) -> None:
    """Refuse a tokenizer that did not make the shards.

    Raises:
        TokenizerError: it is another one.
    """
    if manifest.tokenizer not in digests_of(dvae):
        raise TokenizerError(
            f"tokenizer: got digest {dvae.digest[:12]}, expected {manifest.tokenizer[:12]}, the one that made the "
            "shards. Name that file with --tokenizer."
        )


@torch.no_grad()
def reconstruct(
    model: MaskedImageModel, dvae: DVAE, samples: Sequence[ShardSample], masks: MaskGenerator
) -> list[Reconstruction]:
    """Predict the masked tokens of each sample and decode them.

    Args:
        model: with the run's weights; runs on the device it is on.
        dvae: the tokenizer that made the shards, on any device.
        samples: at least one.
        masks: those of the run; epoch 0's are used.
    """
    device = next(model.parameters()).device
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples])).long()
    positions = torch.from_numpy(np.stack([masks.positions(0, sample.sample_id) for sample in samples])).long()
    patches = torch.from_numpy(np.stack([sample.patches for sample in samples]))
    guesses = model.predict(patches.to(device), positions.to(device)).argmax(-1).cpu()
    predicted = tokens.clone()
    for row, chosen in enumerate(positions):
        predicted[row, chosen[chosen >= 0]] = guesses[row, chosen >= 0]
    truth, painted = _decode(dvae, tokens), _decode(dvae, predicted)

    columns = []
    for row, sample in enumerate(samples):
        chosen = positions[row][positions[row] >= 0]
        hidden = np.zeros(model.config.patches, np.bool_)
        hidden[chosen.numpy()] = True
        size, grid = model.config.patch_size, model.config.grid
        right = int((predicted[row, chosen] == tokens[row, chosen]).sum())
        columns.append(
            Reconstruction(
                sample_id=sample.sample_id,
                hidden=hidden.reshape(grid, grid),
                image=unpatchify(sample.patches, size),
                masked=unpatchify(np.where(hidden[:, None], np.uint8(_GREY), sample.patches), size),
                from_tokens=truth[row],
                from_predictions=painted[row],
                correct=right,
                count=len(chosen),
            )
        )
    return columns


def draw_panel(columns: Sequence[Reconstruction], out: str | Path, title: str = "") -> None:
    """Write a PNG with a column for each sample and a row for each kind of picture.

    The masked area is outlined in the decoded pictures: only inside it do their tokens differ.
    """
    rows = (
        ("image", [column.image for column in columns]),
        ("what the\nmodel sees", [column.masked for column in columns]),
        ("true tokens,\ndecoded", [column.from_tokens for column in columns]),
        ("masked tokens\npredicted,\ndecoded", [column.from_predictions for column in columns]),
    )
    side = 1.45  # inches
    size = (side * len(columns) + 1.2, side * len(rows) + 0.9)
    spacing = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=size, dpi=150, layout=spacing)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for (label, pictures), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for picture, axes in zip(pictures, line, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    for axes_row in grid[2:]:
        for column, axes in zip(columns, axes_row, strict=True):
            _outline(axes, column.hidden, column.from_tokens.shape[0])
    for column, top, bottom in zip(columns, grid[0], grid[-1], strict=True):
        top.set_title(f"sample {column.sample_id}", fontsize=9)
        bottom.set_xlabel(f"{column.correct} of {column.count} right", fontsize=9)
    figure.suptitle(title or "Masked patches, painted from predicted visual tokens", fontsize=11)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def unpatchify(patches: Pixels, patch_size: int) -> Pixels:
    """The image of row-major patches: (P, patch_size² · 3), P a square number, to (height, width, 3)."""
    grid = round(len(patches) ** 0.5)
    cut = patches.reshape(grid, grid, patch_size, patch_size, 3)
    image: Pixels = cut.transpose(0, 2, 1, 3, 4).reshape(grid * patch_size, grid * patch_size, 3)
    return image


def _outline(axes: Axes, hidden: NDArray[np.bool_], side: int) -> None:
    """A line around the masked area of a square picture of ``side`` pixels."""
    cell = side // len(hidden)
    area = np.kron(hidden, np.ones((cell, cell)))
    axes.contour(area, levels=[0.5], colors="white", linewidths=0.8)


def decode_tokens(dvae: DVAE, tokens: Sequence[NDArray[np.int16]]) -> Pixels:
    """What the tokenizer makes of grids of tokens: (B, height, width, 3)."""
    with torch.no_grad():
        return _decode(dvae, torch.from_numpy(np.stack(tokens)).long().flatten(1))


def _decode(dvae: DVAE, tokens: torch.Tensor) -> Pixels:
    """Tokens (B, P) to pictures (B, height, width, 3)."""
    grid = round(tokens.shape[1] ** 0.5)
    device = next(dvae.parameters()).device
    images = dvae.decode(tokens.view(-1, grid, grid).to(device)).cpu()
    pixels: Pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def _read_sample(reader: ShardReader, manifest: Manifest, shard: str, row: int) -> ShardSample:
    layout = manifest.layout
    head, between = bytearray(layout.patches_start), bytearray(_bytes_between(manifest))
    patches = np.empty((layout.patches, layout.patch_bytes), np.uint8)
    tokens = np.empty(layout.patches, np.dtype("<i2"))
    pieces = [memoryview(head), patches.data.cast("B"), memoryview(between), tokens.data.cast("B")]
    reader.read_into(shard, row * layout.stride, pieces)
    stored, key = decode_head(layout, pieces[0])
    crc = sample_crc(key, pieces[1], pieces[3])
    sound = crc == stored and between[-NPY_HEADER:] == layout.tokens_npy_header
    if not sound or not 0 <= tokens.min() <= tokens.max() < layout.vocabulary:
        raise SampleError(f"{shard}, sample {row} ({key}): damaged. check_shards.py tells how much is.")
    return ShardSample(parse_key(key)[1], patches, tokens.astype(np.int16))


def _bytes_between(manifest: Manifest) -> int:
    """Bytes of a sample between its patches and its tokens."""
    layout = manifest.layout
    return layout.tokens_start - layout.patches_start - layout.patches_nbytes
