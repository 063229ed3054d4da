"""Data sets that the tests of the stream share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.http_files import HttpFiles
from support.stream_data import DataSet

from beit_dist.shards.manifest import Manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_shards: Callable[..., Manifest]) -> DataSet:
    root = tmp_path_factory.mktemp("shards")
    return DataSet(root, make_shards(root, [9, 4, 12, 6], views=2, gaps=3), block_samples=3)


@pytest.fixture
def own_data(tmp_path: Path, make_shards: Callable[..., Manifest]) -> DataSet:
    """A data set that the test may damage."""
    return DataSet(tmp_path, make_shards(tmp_path, [8, 8], views=1), block_samples=2)


@pytest.fixture(scope="module")
def served(data: DataSet) -> Iterator[DataSet]:
    """The same data set behind a web server, where worker processes find it, too."""
    with HttpFiles(data.root) as files:
        yield data.at(files.url)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()
