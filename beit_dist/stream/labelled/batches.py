"""The trainer's side of labelled images: one rank batch after another, made by worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from beit_dist.config.labelled import LabelledLoaderConfig
from beit_dist.images.labelled.views import Images, View
from beit_dist.storage.access import Access
from beit_dist.stream.digest import rows_digest
from beit_dist.stream.labelled.pipeline import LabelledPipeline, row_layout
from beit_dist.stream.loading import Loading, fitting_prefetch
from beit_dist.stream.parts import drop_path_depth
from beit_dist.stream.shared_memory import held_bytes

_MADE_OF = ("samples", "epochs", "keeps")
"""What of a row its digest is of."""


@dataclass
class LabelledBatch:
    """A rank's R rows of one optimizer step: CPU tensors, valid until the 2nd batch after."""

    patches: Tensor
    """uint8 (R, patches, patch_bytes)."""
    labels: Tensor
    """int64 (R,) for classes; uint8 (R, S, S) for maps, where 255 is no class."""
    samples: Tensor
    """int64 (R,): numbers in the list of images."""
    epochs: Tensor
    """int64 (R,)."""
    keeps: Tensor | None
    """uint8 (R, depth, 2): 1 keeps a block's residual branch, 0 drops it; None without drop path."""
    digest: int
    """Of the rows' samples, epochs and drop-path keeps: 64 bits, those of all ranks add up (mod 2⁶⁴)."""
    wait_seconds: float
    """How long the caller waited for this batch."""


class LabelledBatches(Loading[LabelledBatch], Generic[Images]):
    """This rank's batches from a position on, for ever.

    Row r of a batch that begins after p samples is sample p + r: epoch and place are ``divmod(p + r, n)``, and the
    order of an epoch is a permutation keyed by (seed, epoch). Neither workers, ranks nor restarts change a row.

    Args:
        images: what is trained on.
        view: makes a sample of an image.
        rows: which rows of the global batch this rank has.
        global_batch: samples of a step over all ranks.
        samples: how many were trained on before.
        seed: keys order, views and drop path.
        drop_path_rates: stochastic-depth rate of each block of the model.
        loader: workers, prefetch, time limit.
        access: how URLs are reached.
        pin: put batches into page-locked memory, for asynchronous copies to a GPU.
        ranks_on_node: ranks that share this node's /dev/shm.

    Raises:
        SpaceError: /dev/shm is too small.
    """

    def __init__(
        self,
        images: Images,
        view: View[Images],
        *,
        rows: range,
        global_batch: int,
        samples: int,
        seed: int,
        drop_path_rates: Sequence[float],
        loader: LabelledLoaderConfig,
        access: Access,
        pin: bool = False,
        ranks_on_node: int = 1,
    ) -> None:
        parts = _even(rows, loader.workers)
        workers, prefetch = len(parts) if loader.workers else 0, loader.prefetch
        if workers:
            layout = row_layout(view, len(rows), drop_path_depth(drop_path_rates))
            prefetch = fitting_prefetch(prefetch, layout.nbytes, ranks_on_node)
        pipeline = LabelledPipeline(
            images,
            view,
            parts=parts,
            global_batch=global_batch,
            samples=samples,
            seed=seed,
            drop_path_rates=drop_path_rates,
            slots=prefetch + 1,  # one is copied while the others are filled
            access=access,
        )
        super().__init__(
            pipeline,
            workers=workers,
            prefetch=prefetch,
            rows=rows,
            timeout_seconds=loader.timeout_seconds,
            where=f"images such as {images.files[0]}",
            pin=pin,
        )
        self.start()

    def make(self, tensors: dict[str, Tensor], consumed: int, faults: list[str]) -> LabelledBatch:
        """The batch."""
        made_of = [tensors[name].numpy() for name in _MADE_OF if name in tensors]
        return LabelledBatch(
            **{name: tensors[name] for name in ("patches", "labels", "samples", "epochs")},
            keeps=tensors.get("keeps"),
            digest=rows_digest(self.rows.start, *made_of),
            wait_seconds=0.0,
        )


def shared_memory_bytes(view: View[Images], rows: int, loader: LabelledLoaderConfig, depth: int) -> int:
    """Bytes of /dev/shm that a rank's loader holds at most.

    Args:
        view: makes the samples.
        rows: of a rank's batch.
        loader: how many steps are read ahead.
        depth: blocks with drop-path keeps.
    """
    return held_bytes(row_layout(view, rows, depth).nbytes, loader.prefetch) if loader.workers else 0


def _even(rows: range, parts: int) -> list[range]:
    """A rank's rows in at most ``parts`` ranges, at least one, as even as can be."""
    parts = max(1, min(parts, len(rows)))
    edges = [rows.start + len(rows) * part // parts for part in range(parts + 1)]
    return [range(edges[part], edges[part + 1]) for part in range(parts)]
