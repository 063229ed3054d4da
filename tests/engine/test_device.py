"""``--device`` chooses what DeepSpeed and PyTorch use, and refuses what is not there."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

from beit_dist.commands import tokenizer, train
from beit_dist.engine import resolve
from beit_dist.engine.device import choose_accelerator, device_of
from beit_dist.errors import ConfigError


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # noted, so that what the code sets is taken back
        monkeypatch.delenv(name)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A machine with so many GPUs, as PyTorch sees them through CUDA_VISIBLE_DEVICES."""

    def seen() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return count if visible is None else sum(int(n) < count for n in visible.split(",") if n)

    monkeypatch.setattr(torch.cuda, "device_count", seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen() > 0)


def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert device_of("auto").type == "cpu"
    choose_accelerator("auto", 1)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    gpus(monkeypatch, 2)
    assert device_of("auto").type == "cuda"


def test_auto_leaves_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    choose_accelerator("auto", 1)
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("3,2", "2")])
def test_a_numbered_gpu_is_the_only_one_that_is_seen(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    gpus(monkeypatch, 4)
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    assert device_of("cuda:1") == torch.device("cuda:1")
    choose_accelerator("cuda:1", 1)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"]) == (after, "cuda")


@pytest.mark.parametrize(("name", "said"), [("abacus", "auto, cpu, cuda or cuda:N"), ("meta", "auto, cpu")])
def test_another_word_is_refused(name: str, said: str) -> None:
    for choose in (device_of, lambda name: choose_accelerator(name, 1)):
        with pytest.raises(ConfigError, match=f"--device: got '{name}', expected {said}"):
            choose(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match="N below 1"):
        device_of("cuda:1")
    with pytest.raises(ConfigError, match="a device of this machine"):
        choose_accelerator("cuda:1", 1)
    gpus(monkeypatch, 0)
    for choose in (device_of, lambda name: choose_accelerator(name, 1)):
        with pytest.raises(ConfigError, match="use cpu or auto"):
            choose("cuda")


def test_several_ranks_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    with pytest.raises(ConfigError, match=r"--device: got 'cuda:1', expected cuda for 2 ranks"):
        choose_accelerator("cuda:1", 2)


@pytest.mark.parametrize("command", [train, tokenizer])
def test_a_command_chooses_before_it_imports_deepspeed(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which looks for an accelerator as it is imported, and then keeps to it."""
    gpus(monkeypatch, 1)

    class LookedError(Exception):
        pass

    def look(*_: object) -> None:
        raise LookedError(os.environ["DS_ACCELERATOR"])

    monkeypatch.setattr(resolve, "resolve", look)
    with pytest.raises(LookedError, match="cpu"):
        command.main(
            ["--run", "r", "--device", "cpu", "--dry-run", *(["--out", "o"] if command is tokenizer else [])]
        )
