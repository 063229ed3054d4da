"""How long a job would take, from a few of its images."""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import torch

from beit_dist.inference.job import Job, Made
from beit_dist.inference.reading import read

_LOOKED_AT = 64
"""Images, most, evenly spread over the list."""
_ENOUGH = 10.0
"""Seconds of looking at them."""


class Estimate(NamedTuple):
    """What was found."""

    seconds: float
    """An image, on one rank."""
    looked_at: int
    unreadable: int


def estimate(job: Job[Made], device: torch.device) -> Estimate:
    """Look at some images of a job, in batches, and write nothing. The first warms up, if another one follows."""
    job.work.model.to(device)
    count, number = len(job.images), min(_LOOKED_AT, len(job.images))
    numbers = [place * count // number for place in range(number)]
    images = read(job.images.files, numbers, job.work.prepare, workers=job.workers, access=job.access)
    size, looked_at, unreadable = min(job.batch, max(1, number // 4)), 0, 0
    began = start = time.perf_counter()
    before = 0
    while some := list(itertools.islice(images, size)):
        readable = [each.made for each in some if each.made is not None]
        if readable:
            job.work.make(readable, None)
        unreadable += len(some) - len(readable)
        looked_at += len(some)
        if time.perf_counter() - began > _ENOUGH:
            break
        if looked_at == len(some) < number:
            start, before = time.perf_counter(), looked_at
    images.close()
    return Estimate((time.perf_counter() - start) / max(1, looked_at - before), looked_at, unreadable)
