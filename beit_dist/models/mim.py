"""Masked image modelling: predict the visual tokens of masked patches (arXiv 2106.08254, section 2.3)."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_dist.config import ModelConfig
from beit_dist.models.vit import BeitBackbone

INIT_STD = 0.02
"""Deviation of the normal distribution that weights are drawn from, truncated at ± one deviation (unilm)."""

PADDING = -100
"""Target of positions that are padding; ``nll_loss`` gives it loss and gradient 0."""


class MimOutput(NamedTuple):
    """Sums over the masked patches of a batch; fp32 scalars on the model's device.

    A tuple, because DeepSpeed's hooks look for tensors in tuples, but not in other classes.
    """

    loss_sum: Tensor
    """Sum of the cross-entropies, in nats."""
    correct: Tensor
    """Number of patches whose most likely token is the right one."""
    count: Tensor  # type: ignore[assignment]  # takes the place of tuple's method of this name
    """Number of masked patches."""


class MaskedImageModel(BeitBackbone):
    """The backbone with a linear head over the vocabulary of visual tokens.

    The head sits on the backbone itself, so that parameters have unilm's names, without a prefix.
    K is the number of positions given per sample.
    """

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        super().__init__(config, recompute=recompute)
        self.lm_head = nn.Linear(config.width, config.vocabulary)
        self._score = score

    def forward(  # type: ignore[override]
        self, patches: Tensor, tokens: Tensor, positions: Tensor, keeps: Tensor | None = None
    ) -> MimOutput:
        """Loss and accuracy on the masked patches.

        Args:
            patches: (B, P, D) uint8 as they lie in a shard.
            tokens: (B, P) integers in [0, vocabulary).
            positions: (B, K) integers, the masked patches; -1 is padding and counts for nothing.
            keeps: (B, depth, 2) stochastic-depth keeps; see :meth:`BeitBackbone.encode`.
        """
        return self._score(self.predict(patches, positions, keeps), tokens, positions)

    def compile_score(self, backend: str = "inductor") -> None:
        """Have loss and accuracy compiled at their first call: one pass over the logits for several."""
        self._score = torch.compile(score, backend=backend, dynamic=False)

    def predict(self, patches: Tensor, positions: Tensor, keeps: Tensor | None = None) -> Tensor:
        """Logits (B, K, vocabulary) of the masked patches; those of padding mean nothing."""
        encoded = self.encode(patches, masked_patches(positions, self.config.patches), keeps)
        batch, length, width = encoded.shape
        rows = positions.long().clamp(min=0) + 1  # behind the class token; padding reads some patch's row
        rows = rows + length * torch.arange(batch, device=rows.device).unsqueeze(1)
        chosen = encoded.reshape(-1, width).index_select(0, rows.flatten())
        logits: Tensor = self.lm_head(chosen)
        return logits.view(batch, -1, self.config.vocabulary)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter, keyed by ``seed`` and the parameter's name: the same on every rank."""
        self.reset_constants()
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, self.config, seed))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups: ``decay`` and ``no_decay``, in the order of ``named_parameters``.

        As in unilm, vectors, biases, the class token and absolute positions are not decayed; the mask token
        and the relative position table are.
        """
        decay: list[nn.Parameter] = []
        no_decay: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (decay if is_decayed(name, parameter.shape) else no_decay).append(parameter)
        return [
            {"name": "decay", "params": decay, "weight_decay": weight_decay},
            {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
        ]


def score(logits: Tensor, tokens: Tensor, positions: Tensor) -> MimOutput:
    """What :class:`MaskedImageModel` returns, from its logits (B, K, vocabulary)."""
    wanted = tokens.long().gather(1, positions.long().clamp(min=0))
    targets = torch.where(positions < 0, PADDING, wanted).flatten()
    log_likelihoods = F.log_softmax(logits.flatten(0, 1), dim=-1, dtype=torch.float32)
    loss_sum = F.nll_loss(log_likelihoods, targets, ignore_index=PADDING, reduction="sum")
    with torch.no_grad():
        guesses = log_likelihoods.max(dim=-1).indices  # argmax is three times as slow on the CPU
        correct = (guesses == targets).sum(dtype=torch.float32)
        count = (targets != PADDING).sum(dtype=torch.float32)
    return MimOutput(loss_sum, correct, count)


def masked_patches(positions: Tensor, patches: int) -> Tensor:
    """Positions (B, K), padded with -1, as a mask: (B, patches) bool."""
    everywhere = torch.arange(patches, device=positions.device, dtype=positions.dtype)
    return (positions.unsqueeze(-1) == everywhere).any(dim=1)


def is_decayed(name: str, shape: torch.Size) -> bool:
    """Whether weight decay applies to a parameter (unilm ``optim_factory.py``)."""
    return len(shape) > 1 and name not in ("cls_token", "pos_embed") and not name.endswith(".bias")


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """A parameter's initial value: fp32 on the CPU (unilm ``modeling_pretrain.py``).

    Weights are drawn from a truncated normal distribution. The two matrices that end the residual branches of
    block l = 1, 2, ... are then divided by sqrt(2 · l).
    """
    kind = name.rsplit(".", 1)[-1]
    if kind in ("bias", "q_bias", "v_bias", "relative_position_bias_table"):
        return torch.zeros(shape)
    if kind in ("gamma_1", "gamma_2"):
        return torch.full(shape, config.layer_scale)
    if "norm" in name:
        return torch.ones(shape)
    value = _truncated_normal(shape, _generator(seed, name))
    residual = re.fullmatch(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight", name)
    return value / math.sqrt(2 * (int(residual[1]) + 1)) if residual else value


def _truncated_normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal with deviation ``INIT_STD`` within ± one deviation, by the inverse of its distribution.

    ``nn.init.trunc_normal_`` rejects and redraws whole tensors: ten times the work at this narrow truncation.
    """
    edge = math.erf(1 / math.sqrt(2))
    uniform = torch.empty(shape, device="cpu").uniform_(-edge, edge, generator=generator)
    return uniform.erfinv_().mul_(INIT_STD * math.sqrt(2)).clamp_(-INIT_STD, INIT_STD)


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each parameter: a draw depends on no other parameter's size or order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
