"""Relative positions: a learned bias of every attention logit, numbered as in unilm: its tables load unchanged."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ALIGNMENT = 16


class RelativePositionBias(nn.Module):
    """A learned bias of every attention logit, by the offset of query and key on the grid; shared by all blocks.

    The table has a row for each of (2 · grid − 1)² offsets and three more: the class token looking at a patch,
    a patch looking at the class token, and the class token looking at itself.
    """

    relative_position_index: Tensor

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_position_rows(grid), heads))
        self.register_buffer("relative_position_index", relative_position_index(grid), persistent=False)

    def reset_constants(self) -> None:
        """Compute the buffer anew, for a module that was built on the meta device."""
        self.relative_position_index.copy_(relative_position_index(self.grid))

    def forward(self) -> Tensor:
        """The bias as (1, H, N, N), in the dtype of the table."""
        return position_bias(self.relative_position_bias_table, self.relative_position_index)


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """Rows (R, H) of a table by an index (N, N), as a bias (1, H, N, N) in the dtype of the table.

    In memory its rows begin at multiples of 16 elements, as PyTorch's kernels and ours want them: each layer would
    make such a copy for itself.
    """
    # Looked up in fp32, since a row's gradient is a sum over up to P pairs that bf16 would round at every term.
    # And by embedding, whose backward adds in a fixed order on CUDA too.
    bias = F.embedding(index, table.float())
    length = index.shape[-1]
    bias = F.pad(bias.to(table.dtype).permute(2, 0, 1), (0, -length % _ALIGNMENT)).contiguous()
    return bias[..., :length].unsqueeze(0)


def relative_position_rows(grid: int) -> int:
    """Rows of a relative position table."""
    return (2 * grid - 1) ** 2 + 3


def relative_position_index(grid: int) -> Tensor:
    """The table's row for every (query, key) pair: int64 (N, N), N = 1 + grid², the class token first.

    Rows are numbered as in unilm, so that its tables load unchanged: row-major in (query − key) offsets, then
    class token to patch, patch to class token, class token to itself.
    """
    side = 2 * grid - 1
    y, x = np.divmod(np.arange(grid * grid), grid)
    index = np.empty((1 + grid * grid, 1 + grid * grid), np.int64)
    index[1:, 1:] = (y[:, None] - y + grid - 1) * side + (x[:, None] - x + grid - 1)
    index[0, :] = side * side
    index[:, 0] = side * side + 1
    index[0, 0] = side * side + 2
    return torch.from_numpy(index)
