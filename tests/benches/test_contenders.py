"""Whoever is measured takes the same kind of step, and who is not to be had is named with the reason."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from beit_dist.benches.contender import Contender
from beit_dist.benches.contenders import CONTENDERS, UPDATED, UnavailableError
from beit_dist.config.model import ModelConfig

SMALL = ModelConfig(width=32, depth=2, heads=2, vocabulary=64)
CPU = torch.device("cpu")
ORIGINAL = """\
import torch
from timm.models.layers import drop_path, to_2tuple, trunc_normal_
from timm.models.registry import register_model


class VisionTransformerForMaskedImageModeling(torch.nn.Linear):
    def __init__(self, *, embed_dim, vocab_size, **others):
        super().__init__(3, vocab_size)

    def forward(self, images, bool_masked_pos):
        patches = images.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).flatten(2).mT
        return super().forward(patches[bool_masked_pos])
"""


# Not those that compile, nor the full tokenizer, whose steps take seconds.
PLAIN = [name for name in {**CONTENDERS, **UPDATED} if "compiled" not in name and "tokenises" not in name]


@pytest.mark.parametrize("name", PLAIN)
def test_a_contender_takes_steps_on_guesses_of_64_tokens(name: str, tmp_path: Path) -> None:
    if name.startswith("Hugging Face"):
        pytest.importorskip("transformers", reason="transformers needs Python 3.11")
    more = {}
    if name.startswith("original"):
        (tmp_path / "modeling_pretrain.py").write_text(ORIGINAL)
        more = {"folder": tmp_path}
    step = {**CONTENDERS, **UPDATED}[name](SMALL, 2, CPU, torch.float32, **more)
    for _ in range(2):
        assert float(step()) == pytest.approx(math.log(64), rel=0.2)
    assert "timm.models.layers" not in sys.modules or "torchvision" in sys.modules
    sys.modules.pop("modeling_pretrain", None)


def test_an_update_changes_what_the_next_step_computes() -> None:
    step = UPDATED["ours, updated"](SMALL, 2, CPU, torch.bfloat16)
    assert float(step()) > float(step()) > float(step())


def test_the_original_code_is_asked_for_or_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="--original"):
        CONTENDERS["original"](SMALL, 2, CPU, torch.float32, folder=None)
    with pytest.raises(UnavailableError, match="No module named 'modeling_pretrain'"):
        CONTENDERS["original"](SMALL, 2, CPU, torch.float32, folder=tmp_path)
    assert str(tmp_path) not in sys.path


def test_a_contender_in_its_own_process_answers_with_seconds_or_with_why_not(tmp_path: Path) -> None:
    with Contender("ours", "tiny", 1, "fp32", None) as ours:
        assert ours.first > 0
        assert len(ours.step(2)) == 2
        assert all(seconds > 0 for seconds in ours.step(2))
    with pytest.raises(UnavailableError, match="No module named 'modeling_pretrain'"):
        Contender("original", "tiny", 1, "fp32", str(tmp_path))
    with pytest.raises(UnavailableError, match="ended with exit code 1: KeyError: 'nobody'"):
        Contender("nobody", "tiny", 1, "fp32", None)
