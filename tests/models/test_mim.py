"""Masked image modelling: equal to a plain reading of the paper, keyed weights, no randomness of its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_dist.config.model import ModelConfig
from beit_dist.models.mim import MaskedImageModel, masked_patches

SMALL = {
    "width": 32,
    "depth": 3,
    "heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vocabulary": 64,
    "drop_path": 0.5,
    "pixel_mean": (0.4, 0.5, 0.6),
    "pixel_std": (0.2, 0.25, 0.3),
}
RELEASED = ModelConfig(**SMALL)
PAPER = ModelConfig(**SMALL, absolute_positions=True, relative_positions=False, layer_scale=0)
PIXELS = ModelConfig(**SMALL, target="pixels")
BOTH = pytest.mark.parametrize("config", [RELEASED, PAPER], ids=["released", "paper"])
TARGETS = pytest.mark.parametrize("config", [RELEASED, PIXELS], ids=["tokens", "pixels"])


def a_model(config: ModelConfig) -> MaskedImageModel:
    """A model whose every parameter matters: those that start at zero or one are perturbed."""
    model = MaskedImageModel(config)
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def a_batch(config: ModelConfig, batch: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches, tokens, positions of 3 to 6 masked patches padded to 6, and keeps with both values."""
    generator = torch.Generator().manual_seed(2)
    patches = torch.randint(
        0, 256, (batch, config.patches, config.patch_bytes), dtype=torch.uint8, generator=generator
    )
    tokens = torch.randint(0, config.vocabulary, (batch, config.patches), generator=generator).to(torch.int16)
    positions = torch.full((batch, 6), -1, dtype=torch.int16)
    for row in range(batch):
        count = 3 + row % 4
        chosen = torch.randperm(config.patches, generator=generator)[:count]
        positions[row, :count] = chosen.sort().values.to(torch.int16)
    counter = torch.arange(batch)[:, None, None] + torch.arange(config.depth)[:, None] + torch.arange(2)
    keeps = (counter % 3 > 0).to(torch.uint8)  # every branch is kept for some image and dropped for another
    return patches, tokens, positions, keeps


def plain_forward(  # one image at a time, one masked patch at a time, as the paper describes it
    weights: dict[str, Tensor], config: ModelConfig, patches: Tensor, positions: list[int], keeps: list[list[int]]
) -> Tensor:
    """Logits (masked, vocabulary) of one image."""
    grid, size, width = config.grid, config.patch_size, config.width
    image = patches.view(grid, grid, size, size, 3).permute(4, 0, 2, 1, 3).reshape(3, grid * size, grid * size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    kernel = weights["patch_embed.proj.weight"].view(width, size, size, 3).permute(0, 3, 1, 2)
    embedded = F.conv2d((image / 255 - mean) / std, kernel, weights["patch_embed.proj.bias"], stride=size)
    rows = list(embedded.flatten(1).t())
    for position in positions:
        rows[position] = weights["mask_token"][0, 0]
    x = torch.stack([weights["cls_token"][0, 0], *rows])
    if config.absolute_positions:
        x = x + weights["pos_embed"][0]
    for block in range(config.depth):
        prefix = f"blocks.{block}."
        scale = 1 - config.drop_path * block / (config.depth - 1)
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        one = torch.ones(width)
        attended = plain_attention(own, config, layer_norm(x, own, "norm1"), weights)
        x = x + attended * own.get("gamma_1", one) * keeps[block][0] / scale
        hidden = F.linear(layer_norm(x, own, "norm2"), own["mlp.fc1.weight"], own["mlp.fc1.bias"])
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = F.linear(hidden, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
        x = x + hidden * own.get("gamma_2", one) * keeps[block][1] / scale
    chosen = layer_norm(x, weights, "norm")[[1 + position for position in positions]]
    return F.linear(chosen, weights["lm_head.weight"], weights["lm_head.bias"])


def plain_attention(own: dict[str, Tensor], config: ModelConfig, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    query_w, key_w, value_w = own["attn.qkv.weight"].chunk(3)
    query, key, value = x @ query_w.t() + own["attn.q_bias"], x @ key_w.t(), x @ value_w.t() + own["attn.v_bias"]
    depth = config.width // config.heads
    mixed = []
    for head in range(config.heads):
        part = slice(head * depth, (head + 1) * depth)
        logits = query[:, part] @ key[:, part].t() / math.sqrt(depth)
        if config.relative_positions:
            column = weights["rel_pos_bias.relative_position_bias_table"][:, head]
            logits = logits + torch.stack([column[row] for row in plain_rows(config.grid)]).view_as(logits)
        mixed.append(logits.softmax(1) @ value[:, part])
    return F.linear(torch.cat(mixed, 1), own["attn.proj.weight"], own["attn.proj.bias"])


def plain_rows(grid: int) -> list[int]:
    """The table's row for every query and key, one pair at a time."""
    side, found = 2 * grid - 1, []
    for query in range(-1, grid * grid):
        for key in range(-1, grid * grid):
            if query < 0 or key < 0:
                found.append(side * side + (2 if query == key else 0 if query < 0 else 1))
            else:
                down, right = query // grid - key // grid, query % grid - key % grid
                found.append((down + grid - 1) * side + right + grid - 1)
    return found


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * weights[name + ".weight"] + weights[name + ".bias"]


@BOTH
@pytest.mark.parametrize("dropping", [False, True], ids=["all kept", "drop path"])
def test_logits_loss_and_gradients_equal_a_plain_implementation(config: ModelConfig, dropping: bool) -> None:
    model, (patches, tokens, positions, keeps) = a_model(config), a_batch(config)
    loss_sum, *counts = model(patches, tokens, positions, keeps if dropping else None)
    logits = model.predict(patches, positions, keeps if dropping else None)
    loss_sum.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    # None scales nothing, so it is the same as rates of zero with everything kept.
    plain_config = config if dropping else config.model_copy(update={"drop_path": 0.0})
    kept = keeps.tolist() if dropping else torch.ones_like(keeps).tolist()
    loss, correct, among = torch.zeros(()), 0, 0
    for row in range(len(patches)):
        masked = [int(p) for p in positions[row] if p >= 0]
        expected = plain_forward(weights, plain_config, patches[row], masked, kept[row])
        torch.testing.assert_close(logits[row, : len(masked)], expected, rtol=1e-4, atol=1e-5)
        for patch, scores in zip(masked, expected, strict=True):
            token = int(tokens[row, patch])
            loss = loss - scores.softmax(0)[token].log()
            correct += int(scores.argmax()) == token
            among += token in scores.topk(5).indices.tolist()
    loss.backward()

    torch.testing.assert_close(loss_sum, loss, rtol=1e-5, atol=0)
    assert [number.item() for number in counts[:2]] == [correct, among]
    for name, parameter in model.named_parameters():
        expected_gradient = weights[name].grad
        assert parameter.grad is not None, name
        assert expected_gradient is not None, name
        largest = expected_gradient.abs().max().item()
        assert largest > 0, f"{name} does not matter in this test"
        difference = (parameter.grad - expected_gradient).abs().max().item()
        assert difference < 2e-4 * largest, name


@TARGETS
def test_padding_adds_nothing_to_loss_counts_or_gradients(config: ModelConfig) -> None:
    model, (patches, tokens, _, keeps) = a_model(config), a_batch(config)
    positions = torch.tensor([[2, 3, 9], [0, 7, 15], [1, 2, 4], [8, 9, 10]])
    padded = F.pad(positions, (0, 5), value=-1)
    found = []
    for given in (positions, padded):
        model.zero_grad()
        result = model(patches, tokens, given, keeps)
        result[0].backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((result, gradient))
    (bare, bare_gradient), (wide, wide_gradient) = found
    for number, one, other in zip(model.head.numbers, bare, wide, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=0, msg=lambda text, n=number: f"{n.name}: {text}")
    torch.testing.assert_close(wide_gradient, bare_gradient, rtol=1e-4, atol=1e-4)


@TARGETS
def test_a_batch_of_nothing_but_padding_has_loss_and_gradients_of_exactly_zero(config: ModelConfig) -> None:
    model, (patches, tokens, positions, keeps) = a_model(config), a_batch(config)
    result = model(patches, tokens, torch.full_like(positions, -1), keeps)
    result[0].backward()
    assert type(result) is tuple  # DeepSpeed's hooks look into no other class
    assert [number.item() for number in result] == [0] * len(model.head.numbers)
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_positions_become_a_mask() -> None:
    positions = torch.tensor([[0, 3, -1], [-1, -1, -1], [4, 1, 0]], dtype=torch.int16)
    assert masked_patches(positions, 5).int().tolist() == [[1, 0, 0, 1, 0], [0] * 5, [1, 1, 0, 0, 1]]


@TARGETS
def test_the_model_draws_no_random_numbers(config: ModelConfig) -> None:
    model, (patches, tokens, positions, keeps) = a_model(config), a_batch(config)
    before = torch.get_rng_state()
    model.train()(patches, tokens, positions, keeps)[0].backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", [RELEASED, PAPER, PIXELS], ids=["released", "paper", "pixels"])
def test_bf16_weights_give_an_fp32_loss_near_that_of_fp32(config: ModelConfig) -> None:
    model, (patches, tokens, positions, keeps) = a_model(config), a_batch(config)
    exact = model(patches, tokens, positions, keeps)
    rounded = model.bfloat16()(patches, tokens, positions, keeps)
    rounded[0].backward()
    assert {number.dtype for number in rounded} == {torch.float32}
    assert abs(rounded[0] - exact[0]) / exact[0] < 0.02
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@TARGETS
def test_the_whole_model_is_one_graph_for_torch_compile(config: ModelConfig) -> None:
    model, batch = a_model(config), a_batch(config)
    whole = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for _ in range(2):
        assert whole(*batch) == model(*batch)


@pytest.mark.parametrize("config", [RELEASED, PAPER, PIXELS], ids=["released", "paper", "pixels"])
def test_initialisation_leaves_nothing_as_it_was(config: ModelConfig) -> None:
    model = MaskedImageModel(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    model.initialise(0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@TARGETS
def test_a_model_made_on_the_meta_device_works_after_initialisation(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = MaskedImageModel(config)
    model = model.to_empty(device="cpu")
    model.initialise(3)
    usual = MaskedImageModel(config)
    usual.initialise(3)
    batch = a_batch(config)
    assert torch.equal(model(*batch)[0], usual(*batch)[0])


def test_the_seed_determines_the_weights() -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.rand(seed + 1)  # the global generator plays no part
        model = MaskedImageModel(RELEASED)
        model.initialise(seed)
        return list(model.parameters())

    first, again, other = weights(5), weights(5), weights(6)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_weights_start_truncated_at_one_deviation_and_shrink_with_depth() -> None:
    model = MaskedImageModel(ModelConfig(width=192, depth=4, heads=3, vocabulary=512, absolute_positions=True))
    model.initialise(0)
    truncated_std = 0.0108  # 0.02 · sqrt(1 − 2 φ(1) / (2 Φ(1) − 1)), the deviation left within ± 0.02
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.dim() == 1 or "relative_position" in name:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.1 if "gamma" in name else 0.0
            assert (value == expected).all(), name
            continue
        is_last = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        shrink = math.sqrt(2 * (int(name.split(".")[1]) + 1)) if is_last else 1.0
        assert 0.95 * 0.02 < value.abs().max() * shrink <= 0.02 * (1 + 1e-6), name
        tolerance = 0.2 if value.numel() < 1000 else 0.02
        assert value.std() * shrink == pytest.approx(truncated_std, rel=tolerance), name


def test_the_first_loss_is_that_of_guessing() -> None:
    config = ModelConfig(width=64, depth=2, heads=2, image_size=64)
    model = MaskedImageModel(config)
    model.initialise(0)
    patches, tokens, positions, _ = a_batch(config, batch=16)
    with torch.no_grad():
        loss_sum = model(patches, tokens, positions)[0]
    assert loss_sum / (positions >= 0).sum() == pytest.approx(math.log(8192), rel=0.01)


def test_weight_decay_spares_what_unilm_spares() -> None:
    config = ModelConfig(**SMALL, absolute_positions=True)
    model = MaskedImageModel(config)
    names = dict(model.named_parameters())
    decay, no_decay = model.parameter_groups(0.05)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.05)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert all(parameter is names[name] for group in (decay, no_decay) for name, parameter in group["params"])
    decayed = [name for name, _ in decay["params"]]
    spared = [name for name, _ in no_decay["params"]]
    assert sorted(decayed + spared) == sorted(names)
    weights = [
        f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    table = "rel_pos_bias.relative_position_bias_table"
    assert set(decayed) == {*weights, "patch_embed.proj.weight", "lm_head.weight", "mask_token", table}
