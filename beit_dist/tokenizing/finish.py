"""Finishing: every shard of the list must be committed and whole; then the manifest makes it a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from beit_dist.errors import DataError
from beit_dist.shards.manifest import (
    HELD_OUT_NAME,
    MANIFEST_NAME,
    Manifest,
    check_shard_files,
    load_manifest,
    shard_name,
)
from beit_dist.shards.statistics import Statistics, Tally, write_statistics
from beit_dist.storage.durable import leftovers
from beit_dist.storage.place import Place
from beit_dist.tokenizing.commits import Commit, read_commits, shard_files, sizes_of
from beit_dist.tokenizing.job import JOB_NAME, Job, check_same_job, read_job
from beit_dist.tokenizing.parts import Part, parts_of
from beit_dist.tokenizing.rejected import REJECTED_NAME, Rejected, check_rejected, rejection_limit
from beit_dist.tokenizing.sources import SOURCES_NAME, SourceList, read_header

_LISTED = 20


def finish(out: Place, settings: Mapping[str, Any], max_rejected: str, workers: int | None = None) -> Manifest:
    """Check the commits, write ``rejected.jsonl``, ``statistics.json`` and, last of all, ``manifest.json``.

    Those of the held-out images come first: a folder with a manifest has all that belongs to it. There are no
    statistics if a commit of an earlier version has no counts.

    Files are checked by their sizes, as reading every byte again would take as long as copying the data set;
    ``beit check`` reads them.

    Args:
        settings: what the user gave (None: not given), compared with the recorded job.
        max_rejected: see :func:`beit_dist.tokenizing.rejected.rejection_limit`.
        workers: how many there were, to name those whose shards are missing; None: not known.

    Raises:
        DataError: a shard is missing, damaged or foreign, or too many images were rejected.
    """
    job = read_job(out)
    check_same_job(out, job, settings)
    sources = SourceList(out, job.shard_samples)
    if sources.sha256 != job.images:
        raise DataError(f"{sources.path}: changed since the job began. Put the old file back, or start over")
    parts = [(part, *_whole_commits(part, workers)) for part in parts_of(out, job, sources)]
    rejected = [entry for _, commits, _ in parts for commit in commits for entry in commit.rejected]
    check_rejected(len(rejected), rejection_limit(max_rejected, sources.header.entries), rejected)
    for part, commits, _ in parts:
        _check_foreign(part.out, commits)
        if not any(commit.samples for commit in commits):
            lost = "nothing to measure on: start over with more --held-out" if part.name else "nothing to train on"
            raise DataError(f"{part.out}: every image was rejected, so there is {lost}")
    *_, manifest = [_write(part, commits, tally) for part, commits, tally in parts]
    return manifest


def _write(part: Part, commits: Sequence[Commit], tally: Tally | None) -> Manifest:
    out, job = part.out, part.job
    rejected = [entry for commit in commits for entry in commit.rejected]
    _remove_leftovers(out, job)
    with out.writing(REJECTED_NAME) as file:
        file.writelines(entry.to_line() for entry in rejected)
    manifest = Manifest(
        layout=job.layout,
        tokenizer=job.tokenizer,
        views=job.views,
        write_seed=job.seed,
        rejected=len(rejected),
        shards=tuple(commit.files[view] for view in range(job.views) for commit in commits if commit.files),
    )
    if tally is not None:
        write_statistics(out, manifest, Statistics(tally, whole=True))
    out.write(MANIFEST_NAME, manifest.to_bytes())
    return manifest


def read_rejected(out: Place) -> list[Rejected]:
    """What the finished job has left out."""
    return [Rejected(**json.loads(line)) for line in out.read(REJECTED_NAME).splitlines()]


def finished(out: Place, settings: Mapping[str, Any]) -> Manifest | None:
    """The manifest, if the folder already holds the finished data set of these settings with all its files.

    None also means damaged: the shards whose files are missing or short are then made again.

    Raises:
        DataError: the folder holds another job's data set.
    """
    if not out.exists(MANIFEST_NAME):
        return None
    if not out.exists(JOB_NAME):
        raise DataError(f"{out}: holds a finished data set, but no {JOB_NAME}. Use another --out")
    manifest = load_manifest(out)
    check_same_job(out, read_job(out), settings)
    split = out.exists(SOURCES_NAME) and read_header(out).held_out > 0
    try:
        check_shard_files(out, manifest)
        if split:
            check_shard_files(out / HELD_OUT_NAME, load_manifest(out / HELD_OUT_NAME))
    except DataError:
        return None
    return manifest


def _whole_commits(part: Part, workers: int | None) -> tuple[list[Commit], Tally | None]:
    """All commits, and their tallies' sum; None if one has none."""
    out, job, shards = part.out, part.job, part.sources.shards
    commits, missing = list[Commit](), list[int]()
    tally: Tally | None = Tally.empty(job.layout)
    for shard, commit in enumerate(read_commits(out, range(shards), job.layout)):
        if commit is None:
            missing.append(shard)
            continue
        commit.check_job(out, job.digest)
        # Summed at once and let go: a tally is 64 KB, and there may be many thousands.
        if tally is not None and commit.tally is not None:
            tally += commit.tally
        else:
            tally = None
        commits.append(replace(commit, tally=None))
    sizes = sizes_of(out, commits)
    damage = {commit.shard: text for commit in commits if (text := commit.damage(sizes))}
    if missing:
        raise DataError(
            f"{out}: {len(missing)} of {shards} shards are not committed: {_some(missing)}. "
            f"{_way_out([*missing, *damage], workers)}"
        )
    if damage:
        raise DataError(f"{out}: {_some(list(damage.values()))}. {_way_out(list(damage), workers)}")
    return commits, tally


def _way_out(shards: Sequence[int], workers: int | None) -> str:
    """How these shards are made, in flags and ids that can be used as they stand."""
    if workers is None or workers == 1:
        return (
            "To make what is missing and finish, run the workers' command with --index 0 --count 1. Or give "
            "--finish the --count of the workers: it then names those to run again"
        )
    missing = sorted({shard % workers for shard in shards})
    return (
        f"Of {workers} workers, these make them: {_ranges(missing)}. Run each of them again with --index and "
        f"--count {workers}, or in SLURM with BEIT_WORKERS={workers} and --array={_ranges(missing)}; then --finish"
    )


def _check_foreign(out: Place, commits: Sequence[Commit]) -> None:
    """Shard files that no commit of the list accounts for would be read by everything but us."""
    known = {info.name for commit in commits for info in commit.files}
    foreign = sorted(shard_files(out) - known)
    if foreign:
        raise DataError(
            f"{out}: holds shards that are on no list: {_some(foreign)}. Move them elsewhere, or remove them"
        )


def _remove_leftovers(out: Place, job: Job) -> None:
    """What killed workers left; in a store that is parts of uploads, which no listing shows."""
    if out.is_local:
        folders = [(out / shard_name(view, 0)).path.parent for view in range(job.views)]
        for folder in (out.path, out.path / "commits", *folders):
            for path in leftovers(folder):
                path.unlink(missing_ok=True)


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(str, names[:_LISTED])) + more


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``sbatch --array`` takes them: ``0,4-7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
