"""What a start does to join: the place is looked up first, and devices are compared at once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit_dist.config import TrainConfig
from beit_dist.engine import process
from beit_dist.engine.distributed import Ranks
from beit_dist.engine.rendezvous import Meeting
from beit_dist.engine.run_folder import RunFolder
from beit_dist.errors import PreflightError


def test_ranks_look_up_the_place_then_meet_then_compare_their_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    def gather(identity: str) -> list[str]:
        done.append("compared")
        return [identity, "GPU-1"]

    def joined(ranks: Ranks, timeout: timedelta, meeting: Meeting) -> torch.device:
        done.append(meeting)
        return torch.device("cuda", 0)

    watchdog = SimpleNamespace(start=lambda: None)
    for name, value in {
        "record_collectives": lambda folder: None,
        "Watchdog": lambda *_: watchdog,
        "look_up": lambda meeting: done.append(f"looked up {meeting.address}"),
        "init_process_groups": joined,
        "store_of_ranks": lambda: None,
        "Agreement": lambda *_: SimpleNamespace(gather=gather),
        "identity": lambda device: f"GPU-{device.index + 1}",
    }.items():
        monkeypatch.setattr(process, name, value)
    meeting = Meeting("node7", 29511)
    timeouts: Any = SimpleNamespace(start=timedelta(seconds=1), now="")
    stop: Any = SimpleNamespace(share=lambda board: done.append("shared"))
    with pytest.raises(PreflightError, match=r"one device between them: 0, 1 \(GPU-1\)"):
        process.join(TrainConfig(run="r"), RunFolder(tmp_path), Ranks(1, 2, 1), meeting, stop, timeouts)
    assert done == ["looked up node7", meeting, "shared", "compared"]
