"""A training step of the model alone, as images and FLOPs a second, against the machine's matrix product."""

from __future__ import annotations

import torch

from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.config.model import ModelConfig
from beit_dist.engine.precision import LOW, choose, speeds
from beit_dist.engine.task import OPERATIONS
from beit_dist.models.flops import multiply_adds
from beit_dist.models.mim import MaskedImageModel

MASKED = 75


def measure(quick: bool) -> list[Row]:
    """Forward and backward with the released settings, on a GPU if there is one, in what the device is fast in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [("tiny", 4)] if quick else [("tiny", 32), ("base", 8)]
    if device.type == "cuda":
        cases = [("base", 128)] if quick else [("base", 128), ("large", 64)]
    kind = LOW.get(choose("auto", "", None, [("", speeds(device))]).precision, torch.float32)
    name = str(kind).removeprefix("torch.")
    rows = []
    for size, batch in cases:
        config = ModelConfig(size=size)
        model = MaskedImageModel(config).to(device)
        model.initialise(0)
        model.to(kind)
        batch_inputs = inputs(config, batch, device)

        def step(model: MaskedImageModel = model, given: tuple[torch.Tensor, ...] = batch_inputs) -> None:
            model.zero_grad(set_to_none=True)
            model(*given)[0].backward()
            _wait(device)

        case = f"{size}, batch {batch}, {name}"
        taken = in_turn({"ours": step}, 3 if quick else 7)["ours"]
        rows.append(row("step", case, "ours", [batch / t for t in taken], "images/s"))
        work = batch * OPERATIONS * multiply_adds(config, MASKED) / 1e12
        rows.append(row("step", case, "ours", [work / t for t in taken], "TFLOP/s"))
    rows.append(_matrix_product(device, kind, quick))
    return rows


def inputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random (patches, tokens, positions) of a batch, on the device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, config.patches, config.patch_bytes), generator=generator)
    tokens = torch.randint(0, config.vocabulary, (batch, config.patches), generator=generator)
    positions = torch.stack([torch.randperm(config.patches, generator=generator)[:MASKED] for _ in range(batch)])
    return pixels.to(device, torch.uint8), tokens.to(device, torch.int16), positions.to(device, torch.int16)


def _matrix_product(device: torch.device, kind: torch.dtype, quick: bool) -> Row:
    n = 8192 if device.type == "cuda" else 1024 if quick else 2048
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))

    name = str(kind).removeprefix("torch.")

    def product() -> None:
        _ = a @ b
        _wait(device)

    taken = in_turn({"torch": product}, 5)["torch"]
    return row("step", f"{name} product of {n}×{n}", "torch", [2e-12 * n**3 / t for t in taken], "TFLOP/s")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
