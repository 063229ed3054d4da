"""This process as one of the ranks: joined, watched, and able to be stopped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from beit_dist.config.run import RunConfig
from beit_dist.engine.ranks.distributed import (
    Agreement,
    Ranks,
    close_process_groups,
    init_process_groups,
    store_of_ranks,
)
from beit_dist.engine.ranks.preemption import StopRequest
from beit_dist.engine.ranks.rendezvous import Meeting, look_up, waiting_said
from beit_dist.engine.ranks.timeouts import Timeouts
from beit_dist.engine.ranks.watchdog import Watchdog, record_collectives
from beit_dist.engine.run_folder import RunFolder


@dataclass(frozen=True)
class Process:
    """What a start has before it knows anything of its run."""

    agreement: Agreement
    device: torch.device
    stop: StopRequest
    watchdog: Watchdog
    timeouts: Timeouts

    @property
    def ranks(self) -> Ranks:
        """This process among all."""
        return self.agreement.ranks

    def leave(self) -> None:
        """The end of a start that ended well; after a failure the others shall not wait for this rank."""
        self.watchdog.close()
        close_process_groups()
        self.stop.close(last=True)


def join(
    config: RunConfig,
    run: RunFolder,
    ranks: Ranks,
    meeting: Meeting | None,
    stop: StopRequest,
    timeouts: Timeouts,
) -> Process:
    """Join the other ranks. Collective; until it returns nobody can be stopped at a boundary.

    Raises:
        ConfigError: the address where they meet cannot be looked up.
        PreflightError: there is no device for this rank, or two ranks have the same one.
    """
    record_collectives(run.ranks)
    watchdog = Watchdog(config.watchdog, run.ranks, ranks.rank).start()  # neither makes the folder
    if meeting is not None:
        look_up(meeting)
    with waiting_said(ranks, meeting, timeouts.now):
        device = init_process_groups(ranks, timeouts.start, meeting)
    stop.share(store_of_ranks())
    agreement = Agreement(ranks, timeouts.start)
    return Process(agreement, device, stop, watchdog, timeouts)
