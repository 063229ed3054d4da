"""Servers that tests can ask for by name; where one is missing the test skips and says how to get it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import browser as real_browser
from support import slurm as slurm_cluster
from support.fault_proxy import FaultProxy
from support.http_files import HttpFiles
from support.object_store import ObjectStore, Unavailable, running

from beit_dist.storage import remote

_NEED_A_SERVER = {"browser", "object_store", "slurm", "slurm_hosts"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``server`` what uses one."""
    for item in items:
        if _NEED_A_SERVER & set(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server, one for each test process; take a bucket of your own by ``new_bucket()``."""
    try:
        with running(tmp_path_factory.mktemp("object_store")) as store:
            yield store
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[real_browser.Browser]:
    """A real browser without a window, one for each test process."""
    try:
        with real_browser.running(tmp_path_factory.mktemp("browser")) as found:
            yield found
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def slurm() -> Iterator[slurm_cluster.Slurm]:
    """A real SLURM cluster of two nodes."""
    try:
        with slurm_cluster.running() as cluster:
            yield cluster
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def slurm_hosts() -> Iterator[slurm_cluster.Slurm]:
    """A real SLURM cluster of three hosts that can be killed, or cut off from the network."""
    try:
        with slurm_cluster.running(3, networks=True) as cluster:
            yield cluster
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def fault_proxy(object_store: ObjectStore) -> Iterator[FaultProxy]:
    """A proxy before the object store; give its ``url`` to the client."""
    with FaultProxy(object_store.endpoint_url, whole=object_store.whole) as proxy:
        yield proxy


@pytest.fixture
def failing_store(
    object_store: ObjectStore, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """The proxy before the object store, by which everything finds it: environment variables say so."""
    for name, value in object_store.environment(fault_proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_systems", {})  # clients of this process that know another proxy
    yield fault_proxy
    fault_proxy.inject()


@pytest.fixture
def http_files(tmp_path: Path) -> Iterator[HttpFiles]:
    """A plain HTTP server with ranges of the files in its ``root``."""
    root = tmp_path / "http"
    root.mkdir()
    with HttpFiles(root) as files:
        yield files
