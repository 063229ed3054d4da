"""The dVAE's objective is the one of the DALL-E paper."""

import math

import pytest
import torch
import torch.nn.functional as F

from beit_dist.config import DVAEConfig
from beit_dist.visual_tokens.dvae import DVAE, Conv, map_pixels
from beit_dist.visual_tokens.objective import (
    cosine,
    elbo,
    gumbel_noise,
    kl_to_uniform,
    logit_laplace_nll,
    perplexity,
    psnr,
    relax,
)

TINY = DVAEConfig(vocabulary=12, hidden=8, blocks_per_group=1, decoder_input=6)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def images(generator):
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture
def model(generator):
    """A dVAE whose biases are not zero, so that mistakes with them show."""
    model = DVAE(TINY)
    for module in model.modules():
        if isinstance(module, Conv):
            module.b.data.normal_(0, 0.5, generator=generator)
    return model


def test_elbo_equals_a_reference_in_plain_numbers(model, images, generator):
    noise = gumbel_noise((3, 12, 2, 2), generator)
    terms = elbo(model, images, noise, temperature=0.7, kl_weight=6.6)
    x = 0.8 * images.double() / 255 + 0.1
    logits = model.encoder(x.float()).double()
    z = ((logits + noise) / 0.7).exp()
    mu, log_b = model.decoder((z / z.sum(1, keepdim=True)).float()).double().split(3, dim=1)
    laplace = torch.distributions.Laplace(mu, log_b.exp())
    # Change of variables: p(x) = p(logit x) / (x (1 - x)).
    log_likelihood = laplace.log_prob(torch.log(x / (1 - x))) - torch.log(x * (1 - x))
    q = logits.softmax(1)
    kl = (q * (q.log() - math.log(1 / 12))).sum()
    expected = (-log_likelihood.sum() + 6.6 * kl) / (3 * 3 * 16 * 16)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms.kl.item() == pytest.approx(kl.item() / 12, rel=1e-4)


def test_usage_term_is_the_kl_of_the_average_distribution(model, images, generator):
    noise = gumbel_noise((3, 12, 2, 2), generator)
    plain = elbo(model, images, noise, 1.0, 2.0)
    weighted = elbo(model, images, noise, 1.0, 2.0, usage_weight=5.0)
    average = model.encoder(map_pixels(images.float() / 255)).softmax(1).mean((0, 2, 3))
    expected = (average * (average * 12).log()).sum()
    assert weighted.usage_kl.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert (weighted.loss - plain.loss).item() == pytest.approx(5 * expected.item() / 192, abs=1e-5)
    assert 0 <= weighted.usage_kl <= weighted.kl


def test_logit_laplace_integrates_to_one():
    x = torch.linspace(1e-5, 1 - 1e-5, 200_001)
    pixels = x.view(1, 1, 1, -1).expand(1, 3, 1, -1)
    for mu, log_b in ((0.0, 0.0), (1.0, -0.5), (-0.7, -1.2)):
        parameters = torch.tensor([mu] * 3 + [log_b] * 3).view(1, 6, 1, 1).expand(1, 6, 1, len(x))
        density = (-logit_laplace_nll(pixels, parameters)).exp()[0, 0, 0]
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=5e-3)


def test_kl_is_zero_for_uniform_and_ln_v_for_certain():
    uniform, certain = torch.zeros(1, 8192, 1, 1), torch.zeros(1, 8192, 1, 1)
    certain[0, 5] = 200
    assert kl_to_uniform(uniform.log_softmax(1), 1).item() == pytest.approx(0, abs=1e-4)
    assert kl_to_uniform(certain.log_softmax(1), 1).item() == pytest.approx(math.log(8192), abs=1e-4)


def test_kl_stays_in_its_range(generator):
    for scale in (0.01, 1, 30, 1000):
        log_q = (torch.randn(4, 64, 3, 3, generator=generator) * scale).log_softmax(1)
        kl = kl_to_uniform(log_q, 1)
        assert (kl > -1e-4).all()
        assert (kl < math.log(64) + 1e-4).all()


def test_gumbel_argmax_samples_the_softmax(generator):
    logits = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    drawn = relax(logits, gumbel_noise((40_000, 3, 1, 1), generator), 1.0).argmax(1).flatten()
    frequencies = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(frequencies, logits.flatten().softmax(0), atol=0.01, rtol=0)


def test_relaxed_nears_the_hard_reconstruction_as_temperature_falls(model, images):
    logits = model.encoder(map_pixels(images.float() / 255))
    noise = torch.zeros_like(logits)
    hard = model.decoder.from_tokens(logits.argmax(1))
    errors = [(model.decoder(relax(logits, noise, t)) - hard).abs().max().item() for t in (4.0, 0.25, 1e-3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 1 / 16])
def test_gradients_are_finite_and_reach_every_parameter(model, images, generator, temperature):
    images[0] = 0
    images[1] = 255
    elbo(model, images, gumbel_noise((3, 12, 2, 2), generator), temperature, 6.6, 1.0).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_noise_depends_on_its_generator_only(generator):
    first = gumbel_noise((5, 4), torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, gumbel_noise((5, 4), torch.Generator().manual_seed(1)))
    assert torch.isfinite(gumbel_noise((100_000,), generator)).all()


def test_cosine_goes_from_start_to_end_and_stays():
    assert cosine(1, 1 / 16, 0, 100) == 1
    assert cosine(1, 1 / 16, 50, 100) == pytest.approx((1 + 1 / 16) / 2)
    assert cosine(1, 1 / 16, 100, 100) == cosine(1, 1 / 16, 900, 100) == pytest.approx(1 / 16)
    assert cosine(0, 6.6, 25, 100) < 6.6 / 4 + 0.1


def test_perplexity_counts_tokens_in_even_use():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1)


def test_psnr_in_decibels():
    images = torch.zeros(2, 3, 4, 4)
    assert psnr(images + 0.1, images) == pytest.approx(20)
    assert psnr(F.relu(images), images) == pytest.approx(100)
