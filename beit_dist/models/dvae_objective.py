"""What the dVAE is trained on: the evidence lower bound with relaxed tokens (DALL-E paper, section 2.1 and A.2).

Noise, temperature and KL weight are passed in: the objective itself draws nothing and remembers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from beit_dist.models.dvae import map_pixels


class ElboTerms(NamedTuple):
    """Scalars of one batch, in nats."""

    loss: Tensor
    """(-log-likelihood + weight · KL) per pixel value: what is minimised."""
    negative_log_likelihood: Tensor
    """Per pixel value, of the relaxed reconstruction."""
    kl: Tensor
    """Per token, in [0, ln V]."""
    usage_kl: Tensor
    """KL of the batch's average token distribution to the uniform one, in [0, kl]: 0 when all are used alike."""
    token_counts: Tensor
    """int64 ``(V,)``: how often each token was the likeliest."""


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32 on the generator's device."""
    exponential = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    # exponential_ can return 0, whose logarithm would make an infinite logit.
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


def logit_laplace_nll(mapped: Tensor, parameters: Tensor) -> Tensor:
    """-ln p of pixels ``(B, 3, H, W)`` in (0, 1) under the decoder's output ``(B, 6, H, W)``; elementwise.

    p(x) = exp(-|logit x - mu| / b) / (2 b x (1 - x)); the first three channels are mu, the last three ln b.
    """
    location, log_scale = parameters.float().chunk(2, dim=1)
    distance = (torch.logit(mapped) - location).abs()
    return distance * torch.exp(-log_scale) + log_scale + math.log(2) + torch.log(mapped * (1 - mapped))


def kl_to_uniform(log_q: Tensor, dim: int) -> Tensor:
    """KL(q || uniform) = ln V - H(q) along ``dim`` of log-probabilities, in [0, ln V]."""
    return math.log(log_q.shape[dim]) + (log_q.exp() * log_q).sum(dim)


def elbo(
    model: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor | None]],
    images: Tensor,
    noise: Tensor,
    temperature: float,
    kl_weight: float,
    usage_weight: float = 0.0,
    whole_usage: Callable[[Tensor], Tensor] = lambda usage: usage,
) -> ElboTerms:
    """The objective on uint8 images ``(B, 3, H, W)``.

    The KL term is the information a position carries about its image plus the KL of the *average* token
    distribution (Hoffman and Johnson, "ELBO surgery", 2016). The paper weighs both alike. ``usage_weight`` adds
    to the second only: it keeps the codebook in use in short trainings on little data, and asks no position to say
    less about its image. (Too much of it drowns the likelihood nevertheless.)

    All terms but that one are means over the images, so a batch can be cut into parts of equal size whose losses
    and gradients are averaged. The average distribution is that of the whole batch: d KL(q̄ ‖ uniform) / d q̄ is
    ln q̄ + 1, so once q̄ is known, the gradient too is a mean over the parts.

    Args:
        model: a :class:`~beit_dist.models.dvae.DVAE`, or what runs one.
        noise: Gumbel noise ``(B, V, H/8, W/8)``.
        kl_weight: in the paper's units, where its final value is 6.6: it multiplies the KL summed over
            positions, and the whole is divided by the number of pixel values.
        usage_weight: the same for the KL of the average distribution; 0 in the paper.
        whole_usage: from these images' average token distribution ``(V,)`` to that of the whole batch that they
            are a part of. By default they are all of it.
    """
    mapped = mapped_pixels(images)
    logits, parameters = model(mapped, noise, temperature)
    if parameters is None:
        raise TypeError("the model gave no reconstruction")
    log_q = torch.log_softmax(logits.float(), dim=1)
    kl = kl_to_uniform(log_q, dim=1)
    negative_log_likelihood = logit_laplace_nll(mapped, parameters).mean()
    loss = negative_log_likelihood + kl_weight * kl.sum() / images.numel()
    usage_kl = torch.zeros_like(loss)
    if usage_weight:
        own = average_usage(log_q)
        usage = whole_usage(own.detach())
        log_usage = usage.clamp_min(torch.finfo(torch.float32).tiny).log()
        usage_kl = math.log(len(usage)) + (usage * log_usage).sum()
        # Adds nothing to the value. Its gradient is that of the KL: the 1 beside ln q̄ meets a sum of zero.
        steer = ((own - own.detach()) * log_usage).sum()
        loss = loss + usage_weight * (usage_kl + steer) * (kl.numel() / images.numel())
    counts = torch.bincount(logits.detach().argmax(dim=1).flatten(), minlength=logits.shape[1])
    return ElboTerms(loss, negative_log_likelihood.detach(), kl.mean().detach(), usage_kl.detach(), counts)


def mapped_pixels(images: Tensor) -> Tensor:
    """uint8 images as the model takes them, in the layout that convolutions are fastest in."""
    return map_pixels(images.float() / 255).contiguous(memory_format=torch.channels_last)


def average_usage(log_q: Tensor) -> Tensor:
    """The average token distribution ``(V,)`` of log-probabilities ``(B, V, h, w)``."""
    return log_q.exp().mean(dim=(0, 2, 3))


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """``start`` at step 0, ``end`` from ``steps`` on, half a cosine between."""
    share = min(1.0, step / steps)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error of images in [0, 1]."""
    return -10 * math.log10(max(error, 1e-10))
