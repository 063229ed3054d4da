"""What is predicted of masked patches: the sums of each head, equal to a plain reading of what it promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.errors import ConfigError
from beit_dist.models.heads.base import LOSS, Counts
from beit_dist.models.heads.pixels import PixelsHead
from beit_dist.models.heads.targets import HEADS, head_of
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.models.mim import MaskedImageModel

SMALL: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vocabulary": 40,
    "pixel_mean": (0.4, 0.5, 0.6),
    "pixel_std": (0.2, 0.25, 0.3),
}
POSITIONS = torch.tensor([[0, 3, 7, 15], [2, 5, -1, -1], [9, 10, 11, -1]], dtype=torch.int16)


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Patches (3, 16, 192) and tokens (3, 16)."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (3, 16, 192), dtype=torch.uint8, generator=generator)
    return patches, torch.randint(0, 40, (3, 16), generator=generator).to(torch.int16)


def masked() -> list[tuple[int, int, int]]:
    """(sample, place in its row of positions, patch) of each masked patch."""
    rows = POSITIONS.tolist()
    return [(b, k, patch) for b, row in enumerate(rows) for k, patch in enumerate(row) if patch >= 0]


@pytest.mark.parametrize("target", HEADS)
def test_a_head_sums_a_number_for_each_that_it_declares(target: str) -> None:
    config = ModelConfig(**SMALL, target=target)
    head = head_of(config)(config)
    sums = head.score(torch.randn(3, 4, head.outputs(config)), *a_batch(), POSITIONS)
    assert len(sums) == len(head.numbers)
    assert all(number.shape == () and number.dtype == torch.float32 for number in sums)
    assert head.numbers[0] == LOSS
    assert len({number.name for number in head.numbers}) == len(head.numbers)


@pytest.mark.parametrize(("target", "name"), [("tokens", "lm_head"), ("pixels", "pixel_head")])
def test_a_head_comes_last_in_the_model_under_its_own_name(target: str, name: str) -> None:
    parameters = list(dict(MaskedImageModel(ModelConfig(**SMALL, target=target)).named_parameters()))
    assert parameters[-2:] == [f"{name}.weight", f"{name}.bias"]
    assert parameters[-4:-2] == ["norm.weight", "norm.bias"]


def test_the_target_does_not_change_how_the_backbone_starts() -> None:
    models = [MaskedImageModel(ModelConfig(**SMALL, target=target)) for target in HEADS]
    for model in models:
        model.initialise(4)
    first, *others = (dict(model.named_parameters()) for model in models)
    for other in others:
        shared = first.keys() & other.keys()
        assert len(shared) == len(first) - 2
        assert all(torch.equal(first[name], other[name]) for name in shared)


def test_an_unknown_target_is_refused_with_what_was_meant() -> None:
    expected = r"model\.target: got 'pixel', expected one of tokens, pixels.* Did you mean pixels\?"
    with pytest.raises(ConfigError, match=expected):
        MaskedImageModel(ModelConfig(**SMALL, target="pixel"))


# ------------------------------------------------------------------------------------------------------- tokens


def test_accuracies_count_the_right_token_and_those_among_the_five_most_likely() -> None:
    patches, tokens = a_batch()
    logits = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(1))
    for place, (b, k, patch) in enumerate(masked()):
        own = int(tokens[b, patch])  # the right token is the (place + 1)th most likely
        others = [token for token in logits[b, k].argsort(descending=True).tolist() if token != own]
        logits[b, k, [*others[:place], own, *others[place:]]] = torch.linspace(2, -2, 40)
    _, correct, among, *_ = TokensHead(ModelConfig(**SMALL)).score(logits, patches, tokens, POSITIONS)
    assert (correct, among) == (1, 5)


def test_equally_likely_tokens_all_count_among_the_five() -> None:
    """``topk`` would choose some of them, and which ones is not told."""
    patches, tokens = a_batch()
    head = TokensHead(ModelConfig(**SMALL))
    assert head.score(torch.zeros(3, 4, 40), patches, tokens, POSITIONS)[2] == len(masked())
    logits = torch.zeros(3, 4, 40)
    for b, k, patch in masked():
        logits[b, k, [(int(tokens[b, patch]) + n) % 40 for n in range(1, 6)]] = 1  # five that are likelier
    assert head.score(logits, patches, tokens, POSITIONS)[2] == 0


def test_without_ties_top_5_is_that_of_topk() -> None:
    generator = torch.Generator().manual_seed(3)
    head = TokensHead(ModelConfig(**SMALL))
    for _ in range(20):
        logits = torch.randn(3, 4, 40, generator=generator)
        patches, tokens = a_batch(5)
        expected = sum(int(tokens[b, patch]) in logits[b, k].topk(5).indices for b, k, patch in masked())
        assert head.score(logits, patches, tokens, POSITIONS)[2] == expected


def test_logits_that_are_no_numbers_are_never_right() -> None:
    _, correct, among, *_ = TokensHead(ModelConfig(**SMALL)).score(
        torch.full((3, 4, 40), torch.nan), a_batch()[0], torch.full((3, 16), 7), POSITIONS
    )
    assert (correct, among) == (0, 0)


def test_with_fewer_than_five_tokens_all_are_among_the_five() -> None:
    config = ModelConfig(**{**SMALL, "vocabulary": 3})
    sums = TokensHead(config).score(torch.randn(3, 4, 3), a_batch()[0], a_batch()[1] % 3, POSITIONS)
    assert sums[2] == len(masked())


# ------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("own", [False, True], ids=["by the model", "by each patch"])
@pytest.mark.parametrize(("loss", "beta"), [("mse", 1.0), ("smooth_l1", 0.5), ("smooth_l1", 0.0)])
def test_the_loss_of_pixels_is_that_of_a_plain_reading(loss: str, beta: float, own: bool) -> None:
    config = ModelConfig(**SMALL, target="pixels", pixels={"loss": loss, "beta": beta, "normalise_patches": own})
    patches, tokens = a_batch()
    predicted = torch.randn(3, 4, 192, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (total,) = PixelsHead(config).score(predicted, patches, tokens, POSITIONS)
    expected = 0.0
    for b, k, patch in masked():
        values = []
        for index, value in enumerate(patches[b, patch].tolist()):
            channel = index % 3
            values.append((value / 255 - SMALL["pixel_mean"][channel]) / SMALL["pixel_std"][channel])
        if own:
            mean = sum(values) / 192
            variance = sum((value - mean) ** 2 for value in values) / 191
            values = [(value - mean) / (variance + 1e-6) ** 0.5 for value in values]
        for value, guess in zip(values, predicted[b, k].tolist(), strict=True):
            error = abs(value - guess)
            small = loss == "mse" or error < beta
            squared = error**2 if loss == "mse" else error**2 / (2 * beta or 1)
            expected += (squared if small else error - beta / 2) / 192
    assert total.item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    gradient = predicted.grad
    assert gradient is not None
    assert (gradient.abs().amax(-1) > 0).tolist() == (POSITIONS >= 0).tolist()


def test_a_patch_of_one_colour_has_a_finite_target() -> None:
    config = ModelConfig(width=32, heads=2, image_size=32, patch_size=8, pixels={"normalise_patches": True})
    assert (PixelsHead(config).target(torch.full((1, 192), 255, dtype=torch.uint8)) == 0).all()


@pytest.mark.parametrize("own", [False, True], ids=["by the model", "by each patch"])
def test_a_perfect_prediction_is_painted_as_the_patch_itself(own: bool) -> None:
    head = PixelsHead(ModelConfig(**SMALL, target="pixels", pixels={"normalise_patches": own}))
    patches, _ = a_batch()
    assert torch.equal(head.paint(head.target(patches), patches), patches)


def test_tokens_play_no_part_in_the_regression_of_pixels() -> None:
    model = MaskedImageModel(ModelConfig(**SMALL, target="pixels"))
    model.initialise(0)
    patches, tokens = a_batch()
    assert model(patches, tokens, POSITIONS) == model(patches, tokens * 0, POSITIONS)


@pytest.mark.parametrize("pixels", [{}, {"loss": "mse", "normalise_patches": True}], ids=["smooth L1", "MAE's"])
def test_the_regression_of_pixels_learns(pixels: dict[str, Any]) -> None:
    """Images of one colour each: what is masked can be told from what is seen."""
    model = MaskedImageModel(ModelConfig(**SMALL, target="pixels", pixels=pixels, drop_path=0))
    model.initialise(0)
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (3, 1, 3), dtype=torch.uint8, generator=generator)
    ramp = torch.arange(64, dtype=torch.uint8).repeat_interleave(3)  # something for each patch's own deviation
    patches = (colours.repeat(1, 16, 64) // 2) + ramp
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(patches, torch.zeros(3, 16), POSITIONS)[0] / len(masked())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def counts(tokens: Tensor, patches: Tensor) -> Counts:
    values = patches.reshape(-1, 3).numpy()
    pixels = np.stack([np.bincount(values[:, channel], minlength=256) for channel in range(3)])
    return Counts(np.bincount(tokens.flatten().numpy(), minlength=40).astype(np.int64), pixels)


def everywhere() -> Tensor:
    """All patches of three samples."""
    return torch.arange(16).expand(3, 16)


def test_a_model_that_knows_the_frequencies_alone_scores_the_baselines_of_tokens() -> None:
    config = ModelConfig(**SMALL)
    patches, tokens = a_batch()
    known = counts(tokens, patches)
    baselines = TokensHead.baselines(config, known)
    head = TokensHead(config)
    logits = torch.from_numpy(known.tokens / known.tokens.sum()).log().float().expand(3, 16, 40)
    loss, right, right5 = (float(number) / 48 for number in head.score(logits, patches, tokens, everywhere()))
    (uniform, frequency), (commonest,), (five,) = (
        baselines[name] for name in ("loss", "accuracy", "top5_accuracy")
    )
    assert uniform == ("uniform", pytest.approx(math.log(40)))
    assert frequency == ("frequency", pytest.approx(loss, rel=1e-5))
    assert commonest == ("commonest token", pytest.approx(right, rel=1e-5))
    assert five.value <= right5 + 1e-6  # of tokens that are equally common the head counts all


def test_held_out_baselines_answer_with_what_training_knew() -> None:
    config = ModelConfig(**SMALL)
    known = Counts(np.array([6, 3, *[0] * 38]), np.zeros((3, 256), np.int64))
    scored = Counts(np.array([1, 0, 3, *[0] * 37]), np.zeros((3, 256), np.int64))
    found = TokensHead.baselines(config, known, scored)
    assert found["loss"][1].value == pytest.approx(-(math.log(7 / 49) + 3 * math.log(1 / 49)) / 4)
    assert found["accuracy"][0].value == 0.25  # the commonest in training, and not the commonest here
    assert TokensHead.baselines(config, None) == {"loss": [("uniform", pytest.approx(math.log(40)))]}


@pytest.mark.parametrize(
    "pixels", [{"loss": "mse"}, {"loss": "smooth_l1", "beta": 0.5}, {"loss": "smooth_l1", "beta": 0.0}]
)
def test_no_single_colour_does_better_than_the_baseline_of_pixels(pixels: dict[str, Any]) -> None:
    config = ModelConfig(**SMALL, target="pixels", pixels=pixels)
    patches, tokens = a_batch()
    patches = patches // torch.tensor([1, 2, 3]).repeat(64)
    (baseline,) = PixelsHead.baselines(config, counts(tokens, patches))["loss"]
    assert baseline.name == "mean colour"
    head = PixelsHead(config)

    def loss(levels: list[float]) -> float:
        colour = (torch.tensor(levels) / 255 - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
        painted = colour.repeat(64).expand(3, 16, 192)
        return float(head.score(painted, patches, tokens, everywhere())[0]) / 48

    tried = [loss([red, red / 2, red / 3]) for red in range(90, 166, 3)]
    assert baseline.value <= min(tried) + 1e-4
    assert baseline.value == pytest.approx(min(tried), rel=0.02)
    normalised = ModelConfig(**SMALL, target="pixels", pixels={**pixels, "normalise_patches": True})
    assert PixelsHead.baselines(normalised, counts(tokens, patches)) == {}
