"""Products in float8: the linear layers of the blocks as torchao's, which cast both sides of every product.

Inputs and weights are cast to e4m3, gradients to e5m2, each tensor with one scale from its largest value. Weights,
their gradients and the optimizer stay as they are, and so do the names of parameters; there are no buffers.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear

from beit_dist.models.vit import BeitBackbone, Block

MULTIPLE = 16
"""Of what the sides of a product in float8 must be multiples (cuBLAS)."""


class _Float8Projection(Float8Linear):  # type: ignore[misc]  # torchao is not typed
    """A layer whose bias belongs to its caller."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        product: Tensor = super().forward(x)
        return product + bias.to(product.dtype)


def use_float8(model: BeitBackbone, *, emulate: bool = False) -> None:
    """Have the blocks compute their products in float8, in place; heads and the embedding stay as they are.

    Args:
        emulate: compute with values rounded to float8 in the model's precision, on any device: for tests.
    """
    # Rows are padded where a batch's tokens are no multiple of 16: the weight's gradient is a product over them.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.qkv = _Float8Projection.from_float(block.attn.qkv, config=config)
        layers: tuple[tuple[nn.Module, str], ...] = ((block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2"))
        for owner, name in layers:
            setattr(owner, name, Float8Linear.from_float(getattr(owner, name), config=config))
