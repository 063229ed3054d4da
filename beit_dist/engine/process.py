"""This process as one of the ranks: joined, watched, and able to be stopped. Both loops are built on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from beit_dist.config import TrainConfig
from beit_dist.engine.distributed import (
    Agreement,
    Ranks,
    close_process_groups,
    init_process_groups,
    store_of_ranks,
)
from beit_dist.engine.preemption import StopRequest
from beit_dist.engine.run_folder import RunFolder
from beit_dist.engine.timeouts import Timeouts
from beit_dist.engine.watchdog import Watchdog, record_collectives
from beit_dist.tokenizer_config import TokenizerRecipe


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
    recipe: TrainConfig | TokenizerRecipe, run: RunFolder, ranks: Ranks, stop: StopRequest, timeouts: Timeouts
) -> Process:
    """Join the other ranks. Collective; until it returns nobody can be stopped at a boundary."""
    record_collectives(run.ranks)
    watchdog = Watchdog(recipe.watchdog, run.ranks, ranks.rank).start()
    device = init_process_groups(ranks, timeouts.start)
    stop.share(store_of_ranks())
    return Process(Agreement(ranks, timeouts.start), device, stop, watchdog, timeouts)
