"""The dVAE's objective is the one of the DALL-E paper."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_dist.config.dvae import DVAEConfig
from beit_dist.models.dvae import DVAE, Conv, map_pixels, relax
from beit_dist.models.dvae_objective import (
    average_usage,
    cosine,
    elbo,
    gumbel_noise,
    kl_to_uniform,
    logit_laplace_nll,
    mapped_pixels,
    psnr,
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


def slow_reference(model, images, noise, temperature, kl_weight):
    """The relaxed ELBO value by value, in doubles, from the paper's formulas. Only the networks are ours."""
    x = [[[[0.8 * v / 255 + 0.1 for v in line] for line in plane] for plane in image] for image in images.tolist()]
    logits = model.encoder(torch.tensor(x))
    count, vocabulary, high, wide = logits.shape
    relaxed, kl = torch.zeros_like(logits), 0.0
    for i in range(count):
        for y in range(high):
            for column in range(wide):
                scores = logits[i, :, y, column].tolist()
                normaliser = sum(math.exp(score) for score in scores)
                for score in scores:
                    q = math.exp(score) / normaliser
                    kl += q * (math.log(q) - math.log(1 / vocabulary))
                gumbel = noise[i, :, y, column].tolist()
                perturbed = [(s + g) / temperature for s, g in zip(scores, gumbel, strict=True)]
                largest = max(perturbed)
                weights = [math.exp(value - largest) for value in perturbed]
                for token, weight in enumerate(weights):
                    relaxed[i, token, y, column] = weight / sum(weights)
    decoded = model.decoder(relaxed).tolist()
    log_likelihood, pixels = 0.0, 0
    for i in range(count):
        for channel in range(3):
            for y, line in enumerate(x[i][channel]):
                for column, value in enumerate(line):
                    mu, log_b = decoded[i][channel][y][column], decoded[i][channel + 3][y][column]
                    distance = abs(math.log(value / (1 - value)) - mu)
                    density = math.exp(-distance / math.exp(log_b)) / (2 * math.exp(log_b) * value * (1 - value))
                    log_likelihood += math.log(density)
                    pixels += 1
    return (-log_likelihood + kl_weight * kl) / pixels, -log_likelihood / pixels, kl / (count * high * wide)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_elbo_equals_a_slow_reference_value_by_value(model, images, generator, temperature):
    noise = gumbel_noise((3, 12, 2, 2), generator)
    terms = elbo(model, images, noise, temperature, kl_weight=6.6)
    loss, negative_log_likelihood, kl = slow_reference(model, images, noise, temperature, 6.6)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-4)
    assert terms.negative_log_likelihood.item() == pytest.approx(negative_log_likelihood, rel=1e-4)
    assert terms.kl.item() == pytest.approx(kl, rel=1e-4)


def test_gradients_equal_those_of_torch_distributions(model, images, generator):
    noise = gumbel_noise((3, 12, 2, 2), generator)
    elbo(model, images, noise, temperature=0.7, kl_weight=6.6).loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    x = 0.8 * images.float() / 255 + 0.1
    logits = model.encoder(x)
    mu, log_b = model.decoder(((logits + noise) / 0.7).softmax(1)).split(3, dim=1)
    pixels = torch.distributions.TransformedDistribution(
        torch.distributions.Laplace(mu, log_b.exp()), [torch.distributions.SigmoidTransform()]
    )
    tokens = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(logits.movedim(1, -1)))
    kl = torch.distributions.kl_divergence(tokens, uniform).sum()
    ((-pixels.log_prob(x).sum() + 6.6 * kl) / images.numel()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_usage_term_is_the_kl_of_the_average_distribution(model, images, generator):
    noise = gumbel_noise((3, 12, 2, 2), generator)
    plain = elbo(model, images, noise, 1.0, 2.0)
    weighted = elbo(model, images, noise, 1.0, 2.0, usage_weight=5.0)
    average = model.encoder(map_pixels(images.float() / 255)).softmax(1).mean((0, 2, 3))
    expected = (average * (average * 12).log()).sum()
    assert weighted.usage_kl.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert (weighted.loss - plain.loss).item() == pytest.approx(5 * expected.item() / 192, abs=1e-5)
    assert 0 <= weighted.usage_kl <= weighted.kl


@pytest.mark.parametrize("parts", [1, 3])
def test_usage_gradient_is_that_of_the_whole_batch_however_it_is_cut(model, images, generator, parts):
    """The mean over the parts, given the whole batch's average, against autograd through that average."""
    noise = gumbel_noise((3, 12, 2, 2), generator)
    plain = elbo(model, images, noise, 1.0, 0.5).loss
    q = model.encoder(mapped_pixels(images)).softmax(1).mean((0, 2, 3))
    loss = plain + 40.0 * (q * (q * 12).log()).sum() * 12 / images.numel()
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    whole = average_usage(model(mapped_pixels(images))[0].detach().log_softmax(1))
    total = 0.0
    for some, own_noise in zip(images.chunk(parts), noise.chunk(parts), strict=True):
        terms = elbo(model, some, own_noise, 1.0, 0.5, 40.0, lambda _: whole)
        (terms.loss / parts).backward()
        total += terms.loss.item() / parts
    assert total == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


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


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=64),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_kl_stays_between_zero_and_ln_v(logits, scale):
    log_q = (torch.tensor(logits) * scale).log_softmax(0)
    kl = kl_to_uniform(log_q, 0).item()
    assert -1e-5 <= kl <= math.log(len(logits)) + 1e-5


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


def test_at_the_last_temperature_relaxed_and_hard_reconstructions_agree(model, images, generator):
    """At the paper's 1/16 a relaxed sample is nearly one-hot, so what is trained is what will be decoded."""
    logits = model.encoder(map_pixels(images.float() / 255))
    noise = gumbel_noise(tuple(logits.shape), generator)
    hard = model.decoder.from_tokens((logits + noise).argmax(1))
    start, end = (model.decoder(relax(logits, noise, t)) for t in (1.0, 1 / 16))
    assert (end - hard).abs().median() < 0.01 * (start - hard).abs().median()
    assert (end - hard).abs().mean() < 0.05 * hard.std()  # the mean has the near-ties in it
    assert (start - hard).abs().mean() > 0.2 * hard.std()


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


def test_psnr_in_decibels():
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0.0) == pytest.approx(100)
