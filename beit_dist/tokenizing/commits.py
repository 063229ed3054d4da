"""Commits: one small file for each shard says that it is whole in all views, and what was left out of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from beit_dist.data.manifest import ShardInfo
from beit_dist.durable import writing
from beit_dist.errors import ConfigError, DataError


class Rejected(NamedTuple):
    """An image that is in no shard, and why."""

    id: int
    name: str
    reason: str


@dataclass(frozen=True)
class Commit:
    """One shard number, all views.

    Args:
        job: digest of the job's settings, which include the list of images and the tokenizer.
        files: one entry for each view; empty if every image of the shard was rejected.
    """

    shard: int
    job: str
    files: tuple[ShardInfo, ...]
    rejected: tuple[Rejected, ...]

    @property
    def samples(self) -> int:
        """Samples of one view."""
        return self.files[0].samples if self.files else 0

    def check_job(self, out: Path, job: str) -> None:
        """Refuse the commit if it is not of the job with this digest.

        Raises:
            DataError: names the commit.
        """
        if self.job != job:
            raise DataError(
                f"{commit_path(out, self.shard)}: made with other images, tokenizer or settings (job "
                f"{self.job[:12]}, expected {job[:12]}). Start over in another --out, or remove the folder"
            )

    def damage(self, out: Path) -> str:
        """What is wrong with the committed files by their sizes; empty if nothing."""
        for info in self.files:
            try:
                size = (out / info.name).stat().st_size
            except OSError as error:
                return f"{info.name}: {error.strerror}"
            if size != info.bytes:
                return f"{info.name}: got {size} bytes, expected {info.bytes}"
        return ""


def commit_path(out: Path, shard: int) -> Path:
    """Where the commit of a shard number lies."""
    return out / "commits" / f"shard-{shard:06d}.json"


def write_commit(out: Path, commit: Commit) -> None:
    """Write a commit, durably; its shard files must be durable already."""
    content = {
        "shard": commit.shard,
        "job": commit.job,
        "files": [asdict(info) for info in commit.files],
        "rejected": [entry._asdict() for entry in commit.rejected],
    }
    with writing(commit_path(out, commit.shard)) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_commit(out: Path, shard: int) -> Commit | None:
    """The commit of a shard number, None if there is none.

    Raises:
        DataError: the file is none of ours.
    """
    path = commit_path(out, shard)
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return Commit(
            shard=content["shard"],
            job=content["job"],
            files=tuple(ShardInfo(**info) for info in content["files"]),
            rejected=tuple(Rejected(**entry) for entry in content["rejected"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}). Remove it: its shard is then made again") from None


def rejection_limit(text: str, entries: int) -> int:
    """How many images may be rejected: a number, or a percentage of the list such as ``1%``.

    Raises:
        ConfigError: it is neither.
    """
    try:
        limit = float(text[:-1]) / 100 * entries if text.endswith("%") else float(int(text))
    except ValueError:
        limit = -1.0
    if not 0 <= limit <= float("inf"):
        raise ConfigError("--max-rejected", text, "a number of images, or a percentage such as 1%")
    return int(min(limit, entries))


def check_rejected(rejected: int, limit: int, examples: Sequence[Rejected]) -> None:
    """Fail the job past the limit.

    Raises:
        DataError: tells some of the reasons.
    """
    if rejected > limit:
        listed = "".join(f"\n  {entry.name}: {entry.reason}" for entry in examples[:5])
        raise DataError(
            f"{rejected} images rejected, more than the {limit} that --max-rejected allows. Repair or remove "
            f"them, or raise it; finished shards are kept. Some of them:{listed}"
        )
