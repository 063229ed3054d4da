"""The engine's fp32 state as flat fragments keyed by parameter name, whatever DeepSpeed optimizer holds it.

A fragment is a run of one parameter's flattened fp32 master weight, or of one of its optimizer moments. Stages 1
and 2 partition a group's concatenated parameters over the ranks, so a rank owns pieces of parameters; stage 3
partitions each parameter; at stage 0 every rank holds everything, and each saves its share. Loading is interval
arithmetic on names, so neither the stage nor the number of ranks need be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from beit_dist.checkpoints.layout import BUFFER, WEIGHT, Fragment
from beit_dist.engine.optimizers.kind import Kept
from beit_dist.engine.optimizers.table import kind_of
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.models.buffers import kept_buffers


@dataclass(frozen=True)
class _Piece:
    """A stretch of a parameter, its master weight's view, and where its moments lie."""

    parameter: str
    start: int
    weight: Tensor
    owner: Tensor  # the tensor that the wrapped optimizer steps; key of its state
    offset: int  # where the piece begins in the flattened owner

    def fragment(self) -> Fragment:
        """The weight, as a view."""
        return Fragment(self.parameter, WEIGHT, self.start, self.weight)


_PARTITIONED = (BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
_SCALER_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineState:
    """Reads and writes the fp32 weights, buffers, moments, update count and loss scale of a DeepSpeed engine."""

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self._optimizer = engine.optimizer
        self._ranks = ranks
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._wrapped: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        kept = kind_of(self._wrapped).kept
        # At stage 3 a parameter itself is empty; DeepSpeed keeps its shape beside it.
        self._kept = {name: kept(name, getattr(p, "ds_shape", p.shape)) for p, name in self._names.items()}
        self._replicated = not isinstance(self._optimizer, _PARTITIONED)
        self._pieces = list(self._find_pieces())
        self._buffers = [
            Fragment(name, BUFFER, 0, buffer.view(-1)) for name, buffer in kept_buffers(engine.module).items()
        ]
        self._attached: list[Fragment] = []
        # FP16_UnfusedOptimizer steps once on zero gradients to create its state: forget that step.
        self._wrapped.state.clear()

    def saved_fragments(self) -> list[Fragment]:
        """What this rank writes: its partition, or at stage 0 its 1/world share of every parameter.

        Buffers, of which all ranks have the same, are rank 0's.
        """
        shared = [*self._buffers] if self._ranks.rank == 0 else []
        return [*self._own_share(self._engine_fragments()), *shared, *self._attached]

    def owned_weights(self) -> list[Fragment]:
        """The part of the master weights that this rank saves, as views."""
        return self._own_share(piece.fragment() for piece in self._pieces)

    def attach(self, fragments: Iterable[Fragment]) -> None:
        """Save and restore these with the rest; no other rank may have the same values."""
        self._attached += fragments

    def _own_share(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        found = []
        for fragment in fragments:
            low, high = 0, fragment.length
            if self._replicated:
                low, high = (fragment.length * (self._ranks.rank + i) // self._ranks.world for i in (0, 1))
            if high > low:
                view = fragment.data[low:high]
                found.append(Fragment(fragment.parameter, fragment.role, fragment.start + low, view))
        return found

    def held_fragments(self) -> list[Fragment]:
        """Everything that this rank holds, as views; what must be filled to restore it."""
        return [*self._engine_fragments(), *self._buffers, *self._attached]

    def _engine_fragments(self) -> list[Fragment]:
        found = []
        for piece in self._pieces:
            length = piece.weight.numel()
            found.append(piece.fragment())
            kept = self._kept[piece.parameter]
            state = self._state_of(piece.owner, kept)
            for role in kept.roles:
                view = state[role].view(-1)[piece.offset : piece.offset + length]
                found.append(Fragment(piece.parameter, role, piece.start, view))
        return found

    @property
    def updates(self) -> int:
        """Updates that the optimizer has counted, for its bias correction; 0 where it counts none."""
        steps = {int(state["step"]) for state in self._wrapped.state.values() if "step" in state}
        if len(steps) > 1:
            raise RuntimeError(f"parameters with different numbers of updates: {sorted(steps)}")
        return steps.pop() if steps else 0

    @property
    def loss_scale(self) -> dict[str, float]:
        """The numbers of fp16's loss scaler; empty without one."""
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in _SCALER_NUMBERS if hasattr(scaler, name)}

    @loss_scale.setter
    def loss_scale(self, numbers: Mapping[str, float]) -> None:
        scaler = self._scaler()
        for name, number in numbers.items():
            if hasattr(scaler, name):
                setattr(scaler, name, number)

    def _scaler(self) -> Any:
        if isinstance(self._optimizer, FP16_UnfusedOptimizer):
            return self._optimizer.loss_scale_config
        return getattr(self._optimizer, "loss_scaler", None)

    @torch.no_grad()
    def publish(self, updates: int) -> None:
        """After the held fragments were filled: set the update count, and make the model's weights of the masters.

        Collective: at stages 1 and 2 every rank's part is gathered.
        """
        for piece in self._pieces:
            kept = self._kept[piece.parameter]
            if kept.counts:
                self._state_of(piece.owner, kept)["step"].fill_(float(updates))
        if isinstance(self._optimizer, FP16_UnfusedOptimizer):
            for low, high in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    parameter.copy_(master)
        elif isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._publish_stage_3()
        elif not self._replicated:
            self._optimizer.update_lp_params()

    def _publish_stage_3(self) -> None:
        """The partitions that forward gathers from, and the small parameters that stay gathered."""
        optimizer = self._optimizer
        for low, high in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            low.copy_(high)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _state_of(self, owner: Tensor, kept: Kept) -> dict[str, Tensor]:
        """The optimizer's state of ``owner``, created as the optimizer itself would at its first step."""
        state: dict[str, Tensor] = self._wrapped.state[owner]
        if not state:
            if kept.counts:
                fused = self._wrapped.defaults.get("fused")
                state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if fused else "cpu")
            for role in kept.roles:
                state[role] = torch.zeros_like(owner, memory_format=torch.preserve_format)
        return state

    def _find_pieces(self) -> Iterator[_Piece]:
        optimizer = self._optimizer
        if isinstance(optimizer, BF16_Optimizer):
            yield from self._partitioned(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            yield from self._partitioned(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            yield from self._split_each()
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            yield from self._whole(optimizer.fp16_groups, optimizer.fp32_groups)
        else:
            groups = [group["params"] for group in optimizer.param_groups]
            yield from self._whole(groups, groups)

    def _partitioned(self, groups: list[list[nn.Parameter]], flats: list[Tensor]) -> Iterator[_Piece]:
        for parameters, flat in zip(groups, flats, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed; None: not ours
                if mapping is not None:
                    offset = mapping.hp_fragment_address.start
                    weight = flat.detach()[offset : offset + mapping.hp_fragment_address.numel]
                    start = mapping.lp_fragment_address.start
                    yield _Piece(self._names[parameter], start, weight, flat, offset)

    def _split_each(self) -> Iterator[_Piece]:
        """Stage 3: rank r owns values [r·n, (r+1)·n) of each flattened parameter, the last ones padding."""
        optimizer = self._optimizer
        for parameter, name in self._names.items():
            group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            start = self._ranks.rank * share
            length = max(0, min(share, parameter.ds_numel - start))
            if length:
                yield _Piece(name, start, flat.detach()[offset : offset + length], flat, offset)

    def _whole(self, groups: list[list[nn.Parameter]], masters: list[list[Tensor]]) -> Iterator[_Piece]:
        for parameters, owners in zip(groups, masters, strict=True):
            for parameter, owner in zip(parameters, owners, strict=True):
                yield _Piece(self._names[parameter], 0, owner.detach().view(-1), owner, 0)
