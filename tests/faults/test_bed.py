"""The test bed itself: the store keeps S3's promises, and each fault reaches a client as what it is called."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import botocore.exceptions
import pytest
import s3fs
from support.fault_proxy import Fault, FaultProxy
from support.http_files import HttpFiles
from support.object_store import ObjectStore, Unavailable

CONTENT = bytes(range(256)) * 4096  # 1 MiB, so that an answer takes several packets


def status(error: botocore.exceptions.ClientError) -> tuple[int, str]:
    """HTTP status and S3 code of a refusal."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]


# The store


def test_the_store_keeps_what_is_put_and_gives_ranges_of_it(object_store: ObjectStore) -> None:
    bucket, client = object_store.new_bucket(), object_store.client()
    client.put_object(Bucket=bucket, Key="v00/a b+c.tar", Body=CONTENT)
    client.put_object(Bucket=bucket, Key="v01/d", Body=b"")
    assert client.get_object(Bucket=bucket, Key="v00/a b+c.tar")["Body"].read() == CONTENT
    part = client.get_object(Bucket=bucket, Key="v00/a b+c.tar", Range="bytes=1000-1299")
    assert part["ContentRange"] == f"bytes 1000-1299/{len(CONTENT)}"
    assert part["Body"].read() == CONTENT[1000:1300]
    listed = client.list_objects_v2(Bucket=bucket, Prefix="v00/")["Contents"]
    assert [(entry["Key"], entry["Size"]) for entry in listed] == [("v00/a b+c.tar", len(CONTENT))]


def test_the_store_refuses_a_conditional_put_on_what_exists(object_store: ObjectStore) -> None:
    bucket, client = object_store.new_bucket(), object_store.client()
    client.put_object(Bucket=bucket, Key="once", Body=b"first", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        client.put_object(Bucket=bucket, Key="once", Body=b"second", IfNoneMatch="*")
    assert status(refused.value) == (412, "PreconditionFailed")
    assert client.get_object(Bucket=bucket, Key="once")["Body"].read() == b"first"


def test_the_store_refuses_a_wrong_secret(object_store: ObjectStore) -> None:
    bucket = object_store.new_bucket()
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        object_store.client(aws_secret_access_key="wrong").list_objects_v2(Bucket=bucket)
    assert status(refused.value) == (403, "SignatureDoesNotMatch")


def test_s3fs_finds_the_store_by_the_environment_and_uploads_in_parts(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    bucket, content = object_store.new_bucket(), CONTENT * 11
    system = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    with system.open(f"{bucket}/parts", "wb", block_size=5 << 20) as file:
        file.write(content)
    assert object_store.whole(f"/{bucket}/parts") == content


def test_a_missing_server_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEIT_SWIFT_PYTHON", str(tmp_path / "python"))
    with pytest.raises(Unavailable, match="`make servers` installs it"):
        ObjectStore(tmp_path).start()


@pytest.mark.parametrize(("nothing", "outcome"), [("1", "1 failed"), ("0", "1 skipped")])
def test_a_test_that_skips_fails_where_nothing_may_be_skipped(
    nothing: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEIT_SKIP_NOTHING", nothing)
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text("import pytest\n\ndef test_it():\n    pytest.skip('no server')\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-o", "addopts=", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert outcome in said
    assert "no server" in said


# The proxy before the store


@pytest.fixture
def key(object_store: ObjectStore) -> dict[str, str]:
    """Where ``CONTENT`` lies in the store."""
    place = {"Bucket": object_store.new_bucket(), "Key": "v00/0.tar"}
    object_store.client().put_object(**place, Body=CONTENT)
    return place


@pytest.mark.parametrize(
    ("kind", "expected"), [("slow_down", (503, "SlowDown")), ("server_error", (500, "InternalError"))]
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_the_store_fails_as_often_as_told_and_works_again(
    kind, expected, method, key: dict[str, str], object_store: ObjectStore, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Fault(kind, method=method, path="/v00/", times=2))
    client = object_store.client(endpoint_url=fault_proxy.url)
    call = {"GET": client.get_object, "PUT": client.put_object}[method]
    for _ in range(2):
        with pytest.raises(botocore.exceptions.ClientError) as failed:
            call(**key)
        assert status(failed.value) == expected
    call(**key)
    assert fault_proxy.injected == {kind: 2}
    assert [seen.fault for seen in fault_proxy.seen] == [kind, kind, ""]


def test_a_reset_request_never_reaches_the_store_and_a_lost_answer_comes_after_the_deed(
    key: dict[str, str], object_store: ObjectStore, fault_proxy: FaultProxy
) -> None:
    client = object_store.client(endpoint_url=fault_proxy.url)
    for kind, kept in (("reset", CONTENT), ("lost", b"new")):
        fault_proxy.inject(Fault(kind, method="PUT"))
        with pytest.raises(botocore.exceptions.ConnectionClosedError):
            client.put_object(**key, Body=b"new")
        assert client.get_object(**key)["Body"].read() == kept
    assert fault_proxy.injected == {"reset": 1, "lost": 1}


def test_a_range_is_answered_in_full(
    key: dict[str, str], object_store: ObjectStore, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Fault("whole", times=1))
    client = object_store.client(endpoint_url=fault_proxy.url)
    assert client.get_object(**key)["Body"].read() == CONTENT  # no range: not this fault's business
    answers = [client.get_object(**key, Range="bytes=10-19") for _ in range(2)]
    assert [answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers] == [200, 206]
    assert [answer["Body"].read() for answer in answers] == [CONTENT, CONTENT[10:20]]


def test_a_delayed_answer_is_too_late_for_an_impatient_client(
    key: dict[str, str], object_store: ObjectStore, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Fault("delay", seconds=600, times=1))
    impatient = botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=0.5)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        object_store.client(endpoint_url=fault_proxy.url, config=impatient).head_object(**key)


# The proxy before plain HTTP


@pytest.fixture
def files(http_files: HttpFiles) -> HttpFiles:
    """A server that has ``CONTENT`` as ``/v00/0.tar``."""
    (http_files.root / "v00").mkdir()
    (http_files.root / "v00/0.tar").write_bytes(CONTENT)
    return http_files


def get(url: str, wanted: str | None = None, timeout: float = 30) -> tuple[int, bytes]:
    """Status and body."""
    request = urllib.request.Request(url, headers={"Range": wanted} if wanted else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, (200, CONTENT)),
        ("bytes=5-9", (206, CONTENT[5:10])),
        ("bytes=1048570-", (206, CONTENT[-6:])),
        ("bytes=-7", (206, CONTENT[-7:])),
        ("bytes=1048570-2000000", (206, CONTENT[-6:])),
    ],
)
def test_files_are_served_whole_and_in_ranges(wanted, expected, files: HttpFiles) -> None:
    with FaultProxy(files.url) as proxy:
        assert get(f"{files.url}/v00/0.tar", wanted) == get(f"{proxy.url}/v00/0.tar", wanted) == expected


@pytest.mark.parametrize(
    ("path", "wanted", "code"),
    [("/v00/1.tar", None, 404), ("/../x", None, 404), ("/v00", None, 404), ("/v00/0.tar", "bytes=1048576-", 416)],
)
def test_what_is_not_there_is_refused(path, wanted, code, files: HttpFiles) -> None:
    (files.root.parent / "x").write_text("outside")
    with pytest.raises(urllib.error.HTTPError, match=str(code)):
        get(files.url + path, wanted)


@pytest.mark.parametrize(("rst", "error"), [(False, http.client.IncompleteRead), (True, ConnectionResetError)])
def test_a_body_is_cut_after_so_many_bytes(rst, error, files: HttpFiles) -> None:
    with FaultProxy(files.url) as proxy:
        proxy.inject(Fault("cut", after=300_000, rst=rst, times=1))
        with pytest.raises(error) as cut:
            get(f"{proxy.url}/v00/0.tar")
        if not rst:
            assert cut.value.partial == CONTENT[:300_000]
        assert get(f"{proxy.url}/v00/0.tar") == (200, CONTENT)
        assert proxy.injected == {"cut": 1}


def test_a_body_that_stalls_is_late_for_an_impatient_client_and_whole_for_a_patient_one(files: HttpFiles) -> None:
    with FaultProxy(files.url) as proxy:
        proxy.inject(Fault("stall", after=300_000, seconds=600, times=1))
        with pytest.raises(TimeoutError):
            get(f"{proxy.url}/v00/0.tar", timeout=0.5)
        proxy.inject(Fault("stall", after=300_000, seconds=0.1))
        assert get(f"{proxy.url}/v00/0.tar") == (200, CONTENT)
        assert proxy.injected == {"stall": 2}


def test_a_server_that_ignores_ranges_can_be_played(files: HttpFiles) -> None:
    with FaultProxy(files.url) as proxy:
        proxy.inject(Fault("whole"))
        assert get(f"{proxy.url}/v00/0.tar", "bytes=5-9") == (200, CONTENT)


def test_faults_by_chance_are_the_same_for_the_same_seed(files: HttpFiles) -> None:
    def outcomes(seed: int) -> list[str]:
        with FaultProxy(files.url, seed=seed) as proxy:
            proxy.inject(Fault("slow_down", chance=0.5))
            for _ in range(20):
                with contextlib.suppress(urllib.error.HTTPError):
                    get(f"{proxy.url}/v00/0.tar", "bytes=0-0")
            return [seen.fault for seen in proxy.seen]

    assert outcomes(1) == outcomes(1) != outcomes(2)
    assert set(outcomes(1)) == {"", "slow_down"}


def test_the_proxy_ends_with_the_test_though_a_request_is_held(files: HttpFiles) -> None:
    with FaultProxy(files.url) as proxy:
        proxy.inject(Fault("delay", seconds=600))
        client = threading.Thread(target=get, args=(f"{proxy.url}/v00/0.tar",))
        client.start()
        while not proxy.seen:
            time.sleep(0.01)
    client.join(30)
    assert not client.is_alive()
