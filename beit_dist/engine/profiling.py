"""``profile``: a trace of a few steps, to see where their time goes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from beit_dist.config.run import ProfileConfig

_log = logging.getLogger(__name__)


class Profiler:
    """Records ``steps`` steps with torch's profiler and writes ``rank-XXXXX.trace.json``, for chrome://tracing.

    Args:
        settings: which steps and ranks.
        folder: ``RUN/ranks``.
        rank: this rank.
    """

    def __init__(self, settings: ProfileConfig, folder: Path, rank: int) -> None:
        self._first, self._path = settings.start_step, folder / f"rank-{rank:05d}.trace.json"
        if rank not in settings.ranks:
            self._first = None
        self._last = (self._first or 0) + settings.steps - 1
        self._profile: Any = None

    def step_begins(self, step: int) -> None:
        """Called before each step, with its number; the first is 1."""
        if step == self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()

    def step_ended(self, step: int) -> None:
        """Called after each step; writes the trace behind the last one recorded."""
        if self._profile is not None and step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also when the run ends before the last step asked for."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
            temporary = self._path.with_name(f"tmp-{self._path.name}")  # torch chooses the format by the ending
            try:
                profile.export_chrome_trace(str(temporary))
                os.replace(temporary, self._path)
            except (OSError, RuntimeError) as error:  # a full disk: looking on must not stop a run
                _log.warning("profile: %s could not be written: %s", self._path, error)
                for rest in self._path.parent.glob(f"{temporary.name}*"):  # torch has temporary names of its own,
                    os.truncate(rest, 0)  # and keeps the file open
                    rest.unlink()
