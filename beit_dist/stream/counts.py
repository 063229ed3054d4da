"""What reading takes: counted in the process that reads, carried with the parts to its rank, exported there."""

from __future__ import annotations

from collections.abc import Mapping

from beit_dist.storage import retries
from beit_dist.storage.counts import Counts

bytes_read = Counts()
"""Bytes of shards by source: ``disk`` (a folder), ``store`` (a URL) or ``cache`` (blocks kept on a local disk)."""
cache_lookups = Counts()
"""Blocks asked of the cache on the local disk: ``hit``, ``miss``, ``damaged``, or ``failed`` for a faulty disk."""
read_again = Counts()
"""Samples that were damaged when first read, by how the second attempt ended: ``whole`` or ``damaged``."""

COUNTERS: dict[str, tuple[Counts, str]] = {
    "beit_data_read_bytes": (bytes_read, "source"),
    "beit_data_cache_lookups": (cache_lookups, "result"),
    "beit_data_samples_read_again": (read_again, "result"),
    "beit_storage_retries": (retries.counts, "cause"),
}
"""By metric: its counts in this process, and the label that tells them apart."""

Taken = dict[str, dict[str, int]]


def take() -> Taken:
    """What was counted since the last call, by metric and label; empty where nothing was."""
    taken = {metric: counts.take() for metric, (counts, _) in COUNTERS.items()}
    return {metric: numbers for metric, numbers in taken.items() if numbers}


def give(taken: Mapping[str, Mapping[str, int]]) -> None:
    """Count in this process what another one has taken."""
    for metric, numbers in taken.items():
        COUNTERS[metric][0].add_all(numbers)
