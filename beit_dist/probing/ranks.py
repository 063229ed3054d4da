"""The ranks of a command that trains nothing: joined where there are several, and ended at once when one fails."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from beit_dist.engine.device import choose_accelerator, device_of
from beit_dist.engine.ranks.distributed import (
    Agreement,
    Ranks,
    close_process_groups,
    init_process_groups,
)
from beit_dist.engine.ranks.rendezvous import look_up, meeting_point, waiting_said
from beit_dist.errors import UserError

_JOIN, _WAIT = timedelta(minutes=30), timedelta(hours=24)
"""How long ranks wait for one another to join, and then for the slowest. One that has ended is noticed at once."""


@contextmanager
def joined(ranks: Ranks, device: str) -> Iterator[tuple[Agreement, torch.device]]:
    """The ranks' agreement, and this rank's device. What is raised inside ends this process if there are others.

    Args:
        ranks: this process among all.
        device: as ``--device`` has it.

    Raises:
        ConfigError: the ranks cannot meet, or there is no such device.
    """
    if ranks.world == 1:
        yield Agreement(ranks, _WAIT), device_of(device)
        return
    choose_accelerator(device, ranks.world)
    meeting = meeting_point(ranks)
    try:
        if meeting is not None:
            look_up(meeting)
        with waiting_said(ranks, meeting, f"{_JOIN.total_seconds() / 60:g} minutes"):
            place = init_process_groups(ranks, _JOIN, meeting)
        yield Agreement(ranks, _WAIT), place
    except BaseException as error:
        said = str(error) if isinstance(error, UserError) else traceback.format_exc()
        print(f"error: rank {ranks.rank} on {socket.gethostname()}: {said}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code if isinstance(error, UserError) else 1)  # the others are in a collective
    close_process_groups()
