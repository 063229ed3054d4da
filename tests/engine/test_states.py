"""The engine's state at every stage and precision, of every optimizer: saved, restored, and trained on the same.

One rank in this process; several ranks, other stages and the whole program are in ``test_training.py``.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.config.optimizer import OptimizerConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.checkpoint.fragments import EngineState
from beit_dist.engine.checkpoint.store import CheckpointStore
from beit_dist.engine.optimizers.table import OPTIMIZERS, check_optimizer
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.resolve import resolve
from beit_dist.engine.wrapped import build_engine
from beit_dist.errors import ConfigError
from beit_dist.storage.local import LocalPlace
from beit_dist.tasks.pretraining.task import Pretraining

pytestmark = pytest.mark.slow

MODEL = {"size": "tiny", "width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}
MASKED, MICRO = 7, 4
LIMIT = timedelta(seconds=120)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, sums in fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 2}},
    "fp16, sums in fp32": {
        "fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 2},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
IMPOSSIBLE = {(0, "bf16, sums in fp32"), (0, "fp16, sums in fp32")}  # refused early: test_resolve.py


def works(optimizer: str, stage: int) -> bool:
    """Whether a start with this optimizer is not refused at this stage, in fp32."""
    try:
        check_optimizer(OptimizerConfig(name=optimizer), stage, "fp32")
    except ConfigError:
        return False
    return True


CELLS = [
    *(("adamw", stage, name) for stage in (0, 1, 2, 3) for name in PRECISIONS if (stage, name) not in IMPOSSIBLE),
    *(
        (name, stage, "fp32")
        for name in OPTIMIZERS
        for stage in (0, 1, 2, 3)
        if name != "adamw" and works(name, stage)
    ),
    ("lion", 0, "bf16"),
    ("lion", 1, "bf16, sums in fp32"),
    ("lion", 2, "fp16"),
    ("lion", 3, "bf16"),
]


@pytest.fixture
def device(joined: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where to train; fp16 is let through on any CPU: slow is fast enough for a test."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(kind, "supported_dtypes", lambda self: [torch.float, torch.half, torch.bfloat16])
    return joined


class Training:
    """An engine, its state, and a few steps on seeded random batches, in two micro-batches each."""

    def __init__(self, device: torch.device, folder: Path, stage: int, precision: str, **recipe: Any) -> None:
        config = PretrainingConfig(
            run=str(folder),
            **{"model": MODEL, **recipe},
            masking={"min_block": 4},  # type: ignore[arg-type]
            global_batch=2 * MICRO,
            micro_batch=MICRO,
        )
        settings = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
        self.engine = build_engine(Pretraining(config), resolve(config, settings, 1), device)
        self.state = EngineState(self.engine, Ranks())
        self.store = CheckpointStore(LocalPlace(folder), config.checkpoint, Agreement(Ranks(), LIMIT))
        self.store.begin_attempt()

    def train(self, *numbers: int, factor: float = 1.0) -> list[tuple[float, bool]]:
        """Train these steps, with ``factor`` times the loss: loss, and whether the update was applied, of each."""
        done = []
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = 0.01
            loss = 0.0
            for _ in range(2):
                loss_sum = self.engine(*_batch(generator))[0]
                self.engine.backward(factor * loss_sum / (2 * MICRO * MASKED), scale_wrt_gas=False)
                self.engine.step()
                loss += loss_sum.item() / (2 * MICRO * MASKED)
            done.append((loss, bool(self.engine.was_step_applied())))
        return done

    def save(self, step: int) -> None:
        """Save and wait."""
        self.store.begin_save(step, self.state, {})
        result = self.store.finish_save()
        assert result is not None
        assert result.ok, result.fault

    def restore(self) -> None:
        """Go back to what is saved."""
        saved = self.store.newest_whole()
        assert saved is not None
        self.store.restore(saved, self.state)

    def values(self) -> dict[str, torch.Tensor]:
        """All fp32 weights and moments."""
        return {fragment.key: fragment.data.clone() for fragment in self.state.saved_fragments()}


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    patches = torch.randint(0, 256, (MICRO, 16, 192), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 64, (MICRO, 16), generator=generator).to(torch.int16)
    positions = torch.stack([torch.randperm(16, generator=generator)[:MASKED] for _ in range(MICRO)])
    return patches, tokens, positions.to(torch.int16)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("optimizer", "stage", "precision"), CELLS)
def test_training_goes_on_to_the_last_bit(
    device: torch.device, tmp_path: Path, optimizer: str, stage: int, precision: str
) -> None:
    whole = Training(device, tmp_path, stage, precision, optimizer={"name": optimizer})
    steps = whole.train(1, 2, 3)
    whole.save(3)
    before = whole.values()
    expected = whole.train(4, 5, 6)
    assert not equal(whole.values(), before)
    assert any(applied for _, applied in expected)
    if "fp16" in precision:
        assert whole.state.loss_scale["cur_scale"] != 2**18  # it moves: it is part of the state

    other = Training(device, tmp_path, stage, precision, optimizer={"name": optimizer})
    other.restore()
    assert equal(other.values(), before)
    assert other.train(4, 5, 6) == expected
    assert equal(other.values(), whole.values())
    assert other.state.loss_scale == whole.state.loss_scale
    applied = sum(applied for _, applied in steps + expected)
    counts = OPTIMIZERS[optimizer].kept("norm.bias", (1,)).counts
    assert other.state.updates == whole.state.updates == (applied if counts else 0)


@pytest.mark.parametrize(("optimizer", "stage"), [(name, stage) for name, stage, kind in CELLS if kind == "fp32"])
def test_gradients_that_are_not_finite_change_nothing(
    device: torch.device, tmp_path: Path, optimizer: str, stage: int
) -> None:
    training = Training(device, tmp_path, stage, "fp32", optimizer={"name": optimizer})
    training.train(1)
    before = training.values()
    assert [applied for _, applied in training.train(2, factor=float("nan"))] == [False]
    assert equal(training.values(), before)
    assert [applied for _, applied in training.train(3)] == [True]
    assert not equal(training.values(), before)


def test_compiled_blocks_train_resume_and_agree_with_those_that_are_not(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    one_block = {**MODEL, "depth": 1}  # each takes a while to compile
    eager = Training(device, tmp_path / "eager", 1, "fp32", model=one_block)
    plain = eager.train(1, 2, 3, 4)
    compiled = Training(device, tmp_path / "run", 1, "fp32", model=one_block, compile=True)
    losses = compiled.train(1, 2)
    compiled.save(2)
    losses += compiled.train(3, 4)
    assert list((tmp_path / "cache").rglob("*.so"))  # it was compiled
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in plain], rel=1e-4)

    resumed = Training(device, tmp_path / "run", 1, "fp32", model=one_block, compile=True)
    resumed.restore()
    assert resumed.train(3, 4) == losses[2:]
    assert equal(resumed.values(), compiled.values())
