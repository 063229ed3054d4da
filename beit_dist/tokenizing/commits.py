"""Commits: one small file for each shard says that it is whole in all views, and what was left out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from beit_dist.errors import DataError, StorageError
from beit_dist.shards.manifest import ShardInfo
from beit_dist.shards.sample import SampleLayout
from beit_dist.shards.statistics import Tally
from beit_dist.storage.place import Place
from beit_dist.tokenizing.rejected import Rejected

_READ_AT_ONCE = 32
_TALLY = "tally"
_VIEW, _SHARD = re.compile(r"v\d{2}"), re.compile(r"[^.].*\.tar")


@dataclass(frozen=True)
class Commit:
    """One shard number, all views.

    Args:
        job: digest of the job's settings, which include the list of images and the tokenizer.
        files: one entry for each view; empty if every image of the shard was rejected.
        tally: of the samples of all views; None in commits of earlier versions, and where it was not asked for.
    """

    shard: int
    job: str
    files: tuple[ShardInfo, ...]
    rejected: tuple[Rejected, ...]
    tally: Tally | None = None

    @property
    def samples(self) -> int:
        """Samples of one view."""
        return self.files[0].samples if self.files else 0

    def check_job(self, out: Place, job: str) -> None:
        """Refuse the commit if it is not of the job with this digest.

        Raises:
            DataError: names the commit.
        """
        if self.job != job:
            raise DataError(
                f"{out / _name(self.shard)}: made with other images, tokenizer or settings (job "
                f"{self.job[:12]}, expected {job[:12]}). Start over in another --out, or remove the folder"
            )

    def damage(self, sizes: Mapping[str, int]) -> str:
        """What is wrong with the committed files by their sizes (see :func:`sizes_of`); empty if nothing."""
        for info in self.files:
            size = sizes.get(info.name)
            if size != info.bytes:
                found = "no such file" if size is None else f"{size} bytes"
                return f"{info.name}: got {found}, expected {info.bytes} bytes"
        return ""


def write_commit(out: Place, commit: Commit) -> None:
    """Write a commit, durably; its shard files must be durable already."""
    content = {
        "shard": commit.shard,
        "job": commit.job,
        "files": [asdict(info) for info in commit.files],
        "rejected": [entry._asdict() for entry in commit.rejected],
    }
    text = json.dumps(content, indent=1)
    if commit.tally is not None:  # on one line: thousands of numbers
        text = f'{text[:-2]},\n "{_TALLY}": {json.dumps(commit.tally.to_json())}\n}}'
    out.write(_name(commit.shard), (text + "\n").encode())


def read_commits(
    out: Place, shards: Sequence[int], counted: SampleLayout | None = None
) -> Iterator[Commit | None]:
    """The commits of these shards, None where there is none.

    Args:
        counted: of their samples, where the tallies shall be read too; they are large.

    Raises:
        DataError: a file is none of ours.
    """
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        yield from pool.map(lambda shard: read_commit(out, shard, counted), shards)


def read_commit(out: Place, shard: int, counted: SampleLayout | None = None) -> Commit | None:
    """The commit of a shard number, None if there is none.

    Args:
        counted: see :func:`read_commits`.

    Raises:
        DataError: the file is none of ours.
    """
    try:
        content: dict[str, Any] = json.loads(out.read(_name(shard)))
        tally = content.get(_TALLY) if counted is not None else None
        return Commit(
            shard=content["shard"],
            job=content["job"],
            files=tuple(ShardInfo(**info) for info in content["files"]),
            rejected=tuple(Rejected(**entry) for entry in content["rejected"]),
            tally=None if tally is None or counted is None else Tally.from_json(tally, counted),
        )
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        path = out / _name(shard)
        raise DataError(f"{path}: cannot be read ({error!r}). Remove it: its shard is then made again") from None


def sizes_of(out: Place, commits: Iterable[Commit]) -> dict[str, int]:
    """Bytes of the committed files by name, as far as they are there."""
    return out.sizes([info.name for commit in commits for info in commit.files])


def shard_files(out: Place) -> set[str]:
    """Every shard file of the folder, whether committed or not."""
    views = filter(_VIEW.fullmatch, out.list())
    return {f"{view}/{name}" for view in views for name in out.list(view) if _SHARD.fullmatch(name)}


def _name(shard: int) -> str:
    return f"commits/shard-{shard:06d}.json"
