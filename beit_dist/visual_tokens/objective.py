"""What the dVAE is trained on: the evidence lower bound with relaxed tokens (DALL-E paper, section 2.1 and A.2).

Noise, temperature and KL weight are passed in: the objective itself draws nothing and remembers nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from beit_dist.visual_tokens.dvae import DVAE, map_pixels


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


def relax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Gumbel-softmax over dimension 1: a differentiable sample that nears a one-hot as ``temperature`` falls."""
    return torch.softmax((logits + noise) / temperature, dim=1)


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
    model: DVAE, images: Tensor, noise: Tensor, temperature: float, kl_weight: float, usage_weight: float = 0.0
) -> ElboTerms:
    """The objective on uint8 images ``(B, 3, H, W)``.

    The KL term is the information a position carries about its image plus the KL of the *average* token
    distribution (Hoffman and Johnson, "ELBO surgery", 2016). The paper weighs both alike. ``usage_weight`` adds
    to the second only: it keeps the codebook in use in short trainings on little data, and costs no information.

    Args:
        noise: Gumbel noise ``(B, V, H/8, W/8)``.
        kl_weight: in the paper's units, where its final value is 6.6: it multiplies the KL summed over
            positions, and the whole is divided by the number of pixel values.
        usage_weight: the same for the KL of the average distribution; 0 in the paper.
    """
    mapped = map_pixels(images.float() / 255).contiguous(memory_format=torch.channels_last)
    logits: Tensor = model.encoder(mapped)
    parameters = model.whole_decoder()(relax(logits, noise, temperature))
    log_q = torch.log_softmax(logits.float(), dim=1)
    kl = kl_to_uniform(log_q, dim=1)
    negative_log_likelihood = logit_laplace_nll(mapped, parameters).mean()
    loss = negative_log_likelihood + kl_weight * kl.sum() / images.numel()
    usage_kl = torch.zeros_like(loss)
    if usage_weight:
        average = torch.logsumexp(log_q.transpose(0, 1).flatten(1), dim=1) - math.log(kl.numel())
        usage_kl = kl_to_uniform(average, dim=0)
        loss = loss + usage_weight * usage_kl * (kl.numel() / images.numel())
    counts = torch.bincount(logits.detach().argmax(dim=1).flatten(), minlength=logits.shape[1])
    return ElboTerms(loss, negative_log_likelihood.detach(), kl.mean().detach(), usage_kl.detach(), counts)


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """``start`` at step 0, ``end`` from ``steps`` on, half a cosine between."""
    share = min(1.0, step / steps)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the tokens' frequencies: how many are in use, weighted by how evenly."""
    share = counts.double() / counts.sum().clamp_min(1)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def psnr(got: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = float((got.double() - expected.double()).square().mean())
    return -10 * math.log10(max(error, 1e-10))
