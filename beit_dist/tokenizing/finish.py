"""Finishing: every shard of the list must be committed and whole; then the manifest makes it a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit_dist.data.shards import MANIFEST_NAME, Manifest, check_shard_files, load_manifest, shard_name
from beit_dist.durable import leftovers, writing
from beit_dist.errors import DataError
from beit_dist.tokenizing.commits import Commit, check_rejected, read_commit, rejection_limit
from beit_dist.tokenizing.job import JOB_NAME, Job, check_same_job, read_job
from beit_dist.tokenizing.sources import SourceList

REJECTED_NAME = "rejected.jsonl"
_LISTED = 20


def finish(out: Path, settings: Mapping[str, Any], max_rejected: str) -> Manifest:
    """Check the commits, write ``rejected.jsonl`` and, last of all, ``manifest.json``.

    Files are checked by their sizes, as reading every byte again would take as long as copying the data set;
    ``tools/check_shards.py`` reads them.

    Args:
        settings: what the user gave (None: not given), compared with the recorded job.
        max_rejected: see :func:`beit_dist.tokenizing.commits.rejection_limit`.

    Raises:
        DataError: a shard is missing, damaged or foreign, or too many images were rejected.
    """
    job = read_job(out)
    check_same_job(out, job, settings)
    sources = SourceList(out, job.shard_samples)
    if sources.sha256 != job.images:
        raise DataError(f"{sources.path}: changed since the job began. Put the old file back, or start over")
    commits = _whole_commits(out, job, sources.shards)
    _check_foreign(out, job, commits)
    rejected = [entry for commit in commits for entry in commit.rejected]
    check_rejected(len(rejected), rejection_limit(max_rejected, sources.header.entries), rejected)
    if not any(commit.samples for commit in commits):
        raise DataError(f"{out}: every image was rejected, so there is nothing to train on")
    _remove_leftovers(out, job)
    with writing(out / REJECTED_NAME) as file:
        file.writelines((json.dumps(entry._asdict()) + "\n").encode() for entry in rejected)
    manifest = Manifest(
        layout=job.layout,
        tokenizer=job.tokenizer,
        views=job.views,
        write_seed=job.seed,
        rejected=len(rejected),
        shards=tuple(commit.files[view] for view in range(job.views) for commit in commits if commit.files),
    )
    with writing(out / MANIFEST_NAME) as file:
        file.write(manifest.to_bytes())
    return manifest


def finished(out: Path, settings: Mapping[str, Any]) -> Manifest | None:
    """The manifest, if the folder already holds the finished data set of these settings with all its files.

    None also means damaged: the shards whose files are missing or short are then made again.

    Raises:
        DataError: the folder holds another job's data set.
    """
    if not (out / MANIFEST_NAME).exists():
        return None
    if not (out / JOB_NAME).exists():
        raise DataError(f"{out}: holds a finished data set, but no {JOB_NAME}. Use another --out")
    manifest = load_manifest(str(out))
    check_same_job(out, read_job(out), settings)
    try:
        check_shard_files(str(out), manifest)
    except DataError:
        return None
    return manifest


def _whole_commits(out: Path, job: Job, shards: int) -> list[Commit]:
    commits: list[Commit] = []
    missing: list[int] = []
    damaged: list[str] = []
    for shard in range(shards):
        commit = read_commit(out, shard)
        if commit is None:
            missing.append(shard)
            continue
        commit.check_job(out, job.digest)
        damage = commit.damage(out)
        if damage:
            damaged.append(damage)
        commits.append(commit)
    if missing:
        raise DataError(
            f"{out}: {len(missing)} of {shards} shards are not committed: {_some(missing)}. Worker i of N makes "
            "shards i, i + N, ...: run those workers (again), then --finish"
        )
    if damaged:
        raise DataError(f"{out}: {_some(damaged)}. Run the workers again: they make such shards anew")
    return commits


def _check_foreign(out: Path, job: Job, commits: Sequence[Commit]) -> None:
    """Shard files that no commit of the list accounts for would be read by everything but us."""
    known = {info.name for commit in commits for info in commit.files}
    found = {f"{path.parent.name}/{path.name}" for path in out.glob("v[0-9][0-9]/*") if path.suffix == ".tar"}
    foreign = sorted(found - known)
    if foreign:
        raise DataError(f"{out}: holds shards of no list: {_some(foreign)}. Move them elsewhere, or remove them")


def _remove_leftovers(out: Path, job: Job) -> None:
    folders = [(out / shard_name(view, 0)).parent for view in range(job.views)]
    for folder in (out, out / "commits", *folders):
        for path in leftovers(folder):
            path.unlink(missing_ok=True)


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(str, names[:_LISTED])) + more
