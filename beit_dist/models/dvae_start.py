"""First weights of a dVAE that already make tokens and draw them: clusters of patches, in place of noise.

From random weights a short training spends most of its steps until encoder and decoder agree on any token at
all, and settles for a few. Here the first weights make the tokens that k-means would:

- The untrained encoder is a bank of random filters. Least squares maps its features to what a patch looks like.
- The centres of clusters there become the rows of the encoder's last layer, whose argmax is the nearest centre.
- The decoder's first layer places each token where its centre is: tokens that look alike are close to one another.
- The decoder's last layer is fitted by least squares too, so that it begins with the colours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.models.clusters import k_means
from beit_dist.models.dvae import DVAE, STRIDE, Conv
from beit_dist.models.dvae_objective import mapped_pixels

_PARTS = 24
"""Principal components of patches that clusters are made in. 8 and 64 came to the same."""
_ENTROPY = 1.5
"""Nats of a position's token distribution, on average: unsure enough to learn from the neighbours of its token."""
_RIDGE = 1e-4
_AT_ONCE, _DRAWN = 64, 64
"""Images in one forward pass, and images that the decoder's last layer is fitted on."""


@torch.no_grad()
def start_from_clusters(model: DVAE, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Give the model its first weights; those that were set, by name.

    Args:
        model: with random weights, on the CPU.
        images: uint8 ``(N, 3, H, W)``: training crops, some patches for each token.
        seed: of the clusters, and of the directions of the decoder's first layer.
    """
    before = {name: values.clone() for name, values in model.state_dict().items()}
    features = torch.cat([_encoder_features(model, some) for some in torch.split(images, _AT_ONCE)])
    centre = features.mean(0)
    predicted, to_patch = _predicted_patches(features - centre, _patches(images))
    centres = k_means(predicted, model.config.vocabulary, seed)
    sharpness = _sharpness(predicted[:: max(1, len(predicted) // 4096)], centres)
    weights = 2 * sharpness * centres @ to_patch.t()
    last, first = _layer(model, "encoder.blocks.output.conv"), _layer(model, "decoder.blocks.input")
    last.w.copy_(weights[:, :, None, None])
    last.b.copy_(-sharpness * centres.square().sum(1) - weights @ centre)
    first.w.copy_(_places(centres, model.config.decoder_input, seed).t()[:, :, None, None])
    _fit_last_layer(model, images[:_DRAWN])
    return {name: values for name, values in model.state_dict().items() if not torch.equal(values, before[name])}


def _layer(model: DVAE, name: str) -> Conv:
    found = model.get_submodule(name)
    assert isinstance(found, Conv)
    return found


def _encoder_features(model: DVAE, images: Tensor) -> Tensor:
    """What the encoder's last layer is given, ``(positions, F)``."""
    return _positions(F.relu(model.encoder.blocks[:-1](mapped_pixels(images))))


def _fit_last_layer(model: DVAE, images: Tensor) -> None:
    """The decoder's last layer: locations by least squares, one scale for each channel."""
    first, last = _layer(model, "decoder.blocks.input"), _layer(model, "decoder.blocks.output.conv")
    x = F.embedding(model.tokens(images), first.w[:, :, 0, 0].t()) + first.b
    features = _positions(F.relu(model.whole_decoder().blocks[1:-1](x.permute(0, 3, 1, 2))))
    wanted = _positions(torch.logit(mapped_pixels(images)))
    centre, level = features.mean(0), wanted.mean(0)
    weights = _least_squares(features - centre, wanted - level)
    error = (features - centre) @ weights + level - wanted
    last.w.copy_(torch.cat([weights.t(), torch.zeros_like(weights.t())])[:, :, None, None])
    last.b.copy_(torch.cat([level - centre @ weights, error.abs().mean(0).clamp_min(1e-3).log()]))


def _positions(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B · H · W, C)``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _patches(images: Tensor) -> Tensor:
    """Mapped pixels less their mean, ``(positions, 3 · 8 · 8)``."""
    patches = F.unfold(mapped_pixels(images), STRIDE, stride=STRIDE).transpose(1, 2).flatten(0, 1)
    return patches - patches.mean(0)


def _predicted_patches(features: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Patches' principal components as far as features tell them ``(positions, P)``; the map ``(F, P)``."""
    _, directions = torch.linalg.eigh(patches.t() @ patches)
    parts = patches @ directions[:, -_PARTS:]
    to_patch = _least_squares(features, parts)
    return features @ to_patch, to_patch


def _least_squares(features: Tensor, wanted: Tensor) -> Tensor:
    """The ``(F, P)`` that makes of features ``(N, F)`` what is nearest to ``(N, P)``, a little damped."""
    square = features.t() @ features
    square.diagonal().add_(_RIDGE * square.diagonal().mean())
    solution: Tensor = torch.linalg.solve(square, features.t() @ wanted)
    return solution


def _sharpness(points: Tensor, centres: Tensor) -> float:
    """The factor of negative squared distances at which a softmax over them has the wanted mean entropy."""
    closeness = 2 * points @ centres.t() - centres.square().sum(1)
    wanted = min(_ENTROPY, math.log(len(centres)) / 2)
    low, high = 1e-6, 1e9
    for _ in range(40):
        middle = math.sqrt(low * high)
        log_q = torch.log_softmax(closeness * middle, dim=1)
        too_even = float(-(log_q.exp() * log_q).sum(1).mean()) > wanted
        low, high = (middle, high) if too_even else (low, middle)
    return math.sqrt(low * high)


def _places(centres: Tensor, width: int, seed: int) -> Tensor:
    """The centres in random directions of the decoder's first layer, of unit size: ``(V, width)``."""
    offsets = centres - centres.mean(0)
    offsets /= offsets.square().sum(1).mean().sqrt().clamp_min(1e-12)
    directions = torch.randn(width, offsets.shape[1], generator=torch.Generator().manual_seed(seed))
    if width >= offsets.shape[1]:
        directions = torch.linalg.qr(directions)[0]
    else:
        directions /= math.sqrt(width)
    return offsets @ directions.t() * math.sqrt(width)
