"""Muon (kellerjordan.github.io/posts/muon; arXiv 2502.16982), torch's own, for the blocks' matrices.

It makes the momentum of a matrix orthogonal, so it is for matrices that map hidden features to hidden features:
attention's and the MLP's in the blocks. All else is AdamW's, as is usual: embeddings of patches and positions,
class and mask token, the relative position table, the head, biases, norms and LayerScale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.engine.optimizers.adamw import build_adamw, kept_by_adamw
from beit_dist.engine.optimizers.kind import Groups, Kept, OptimizerKind
from beit_dist.errors import ConfigError


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that are stepped as one, with the groups and the state of both."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self._parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.defaults = adamw.defaults
        muon.state = adamw.state = self.state  # the groups are shared too: what is set in one holds in the other

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure."""
        for part in self._parts:
            part.step()


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates this parameter."""
    return len(shape) == 2 and name.startswith("blocks.")


def build_muon(groups: Groups, settings: OptimizerConfig) -> MuonAndAdamW:
    """Muon over the hidden matrices of ``groups``, and AdamW over the others.

    Muon's updates are scaled to the usual size of AdamW's (arXiv 2502.16982, section 2.2), so one learning rate
    and one weight decay suit both.
    """
    halves: dict[bool, Groups] = {True: [], False: []}
    for group in groups:
        for hidden, half in halves.items():
            params = [(name, p) for name, p in group["params"] if is_hidden_matrix(name, p.shape) is hidden]
            if params:
                name = f"{group['name']}, hidden matrices" if hidden else group["name"]
                half.append({**group, "name": name, "params": params})
    muon = torch.optim.Muon(halves[True], lr=0.0, adjust_lr_fn="match_rms_adamw", **settings.muon.model_dump())
    return MuonAndAdamW(muon, build_adamw(halves[False], settings))


def kept_by_muon(name: str, shape: Sequence[int]) -> Kept:
    """One moment of a hidden matrix, AdamW's two of anything else."""
    return Kept(("momentum_buffer",)) if is_hidden_matrix(name, shape) else kept_by_adamw(name, shape)


def check_matrices(shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a model without hidden matrices."""
    if not any(is_hidden_matrix(name, shape) for name, shape in shapes.items()):
        raise ConfigError(
            "optimizer.name", "muon", "adamw or lion: this model has no matrices in blocks, which Muon is for"
        )


def check_muon(stage: int, precision: str) -> None:
    """Refuse Muon where DeepSpeed hands it flattened pieces of matrices, or torch has none."""
    if not hasattr(torch.optim, "Muon"):
        way_out = "Install it, or use adamw or lion."
        raise ConfigError(
            "optimizer.name", "muon", f"torch 2.9 or newer for it, but this is {torch.__version__}", way_out
        )
    if stage != 0 or precision != "fp32":
        where = f"ZeRO stage {stage}" if precision == "auto" else f"ZeRO stage {stage} in {precision}"
        raise ConfigError(
            "optimizer.name",
            "muon",
            f"adamw or lion at {where}, where DeepSpeed has no whole fp32 matrices to update",
            "For muon use --ds_config zero0 and precision=fp32.",
        )


MUON = OptimizerKind(
    cls=MuonAndAdamW,
    build=build_muon,
    kept=kept_by_muon,
    uses=frozenset({"betas", "eps", "muon"}),
    check=check_muon,
    check_shapes=check_matrices,
)
