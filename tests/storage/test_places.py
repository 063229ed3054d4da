"""What a place promises, whether it is a folder, memory, a store that was added, or one behind a bad network."""

from __future__ import annotations

import pickle
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.registry import known_implementations
from support.fault_proxy import Fault, FaultProxy
from support.http_files import HttpFiles
from support.object_store import ObjectStore
from support.shelf import ShelfPlace

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.errors import AccessError, ConfigError, StorageError
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import STORES, open_place
from beit_dist.storage.place import Place, is_url
from beit_dist.storage.retries import counts, retrying

CONTENT = bytes(range(256)) * 80_000  # 20 MB: an upload in parts


@pytest.fixture(params=["local", "memory", "store", "added"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty place of each kind."""
    if request.param == "local":
        yield open_place(tmp_path / "place")
    elif request.param == "memory":
        yield open_place(f"memory://{uuid.uuid4()}/place")
    elif request.param == "added":
        monkeypatch.setitem(STORES, "shelf", ShelfPlace)
        yield open_place(f"shelf://{uuid.uuid4()}/place")
    else:
        store: ObjectStore = request.getfixturevalue("object_store")
        yield open_place(f"s3://{store.new_bucket()}/some/place", store_access(store))


@pytest.fixture
def behind(object_store: ObjectStore) -> Iterator[tuple[Place, FaultProxy]]:
    """A place in the store, and the proxy through which it is reached."""
    with FaultProxy(object_store.endpoint_url, whole=object_store.whole) as proxy:
        access = store_access(object_store, proxy.url, retry_seconds=20.0)
        counts.take()
        yield open_place(f"s3://{object_store.new_bucket()}/place", access), proxy


def store_access(store: ObjectStore, url: str = "", retry_seconds: float = 60.0, secret: str = "") -> Access:
    """Settings for the tests' store, with short time limits."""
    options = {"endpoint_url": url or store.endpoint_url, "key": store.key, "secret": secret or store.secret}
    return Access(retry_seconds, 2.0, 2.0, 8, {"s3": {**options, "client_kwargs": {"region_name": store.region}}})


def write(place: Place, name: str, content: bytes) -> None:
    """Write through :meth:`Place.writing`, in pieces."""
    with place.writing(name) as file:
        for start in range(0, len(content), 3_000_000):
            file.write(content[start : start + 3_000_000])


def test_what_is_written_is_read_whole_in_ranges_and_in_pieces(place: Place) -> None:
    place.make()
    write(place, "large", CONTENT)
    place.write("small", b"one")
    place.write("small", b"two")
    assert place.read("small") == b"two"
    assert (place.size("large"), place.exists("large"), place.exists("other")) == (len(CONTENT), True, False)
    buffer = bytearray(1000)
    place.read_into("large", 12_345, memoryview(buffer))
    assert buffer == CONTENT[12_345:13_345]
    assert b"".join(place.chunks("large")) == CONTENT
    with pytest.raises(EOFError):
        place.read_into("large", len(CONTENT) - 10, memoryview(buffer))
    with pytest.raises(FileNotFoundError):
        place.read("other")


def test_folders_are_listed_and_removed_with_what_they_hold(place: Place) -> None:
    assert place.list() == []
    inner = place / "inner"
    inner.make()
    inner.write("b", b"")
    inner.write("a", b"1")
    place.write("c", b"2")
    assert (place.list(), place.list("inner"), inner.list()) == (["c", "inner"], ["a", "b"], ["a", "b"])
    assert (inner.name, str(inner.parent), str(inner)) == ("inner", str(place), f"{place}/inner")
    inner.remove("a")
    inner.remove("a")
    assert inner.list() == ["b"]
    place.remove_folder("inner")
    place.remove_folder("inner")
    assert place.list() == ["c"]


def test_sizes_are_told_of_the_files_that_are_there(place: Place) -> None:
    for name, size in (("a/one", 3), ("a/two", 0), ("b/c/one", 5), ("b/more", 1)):
        (place / name).parent.make()
        place.write(name, b"x" * size)
    names = ["b/c/one", "a/one", "a/three", "a/two", "none/one"]
    assert place.sizes(names) == {"b/c/one": 5, "a/one": 3, "a/two": 0}


def test_a_store_tells_all_sizes_by_a_few_lists_or_file_by_file(behind: tuple[Place, FaultProxy]) -> None:
    place, proxy = behind
    sizes = {f"v{number % 2:02d}/{number}": number for number in range(12)}
    for name, size in sizes.items():
        place.write(name, b"x" * size)
    proxy.seen.clear()
    assert place.sizes(list(sizes)) == sizes
    assert [(seen.method, "list-type" in seen.path) for seen in proxy.seen] == [("GET", True)] * 2
    proxy.inject(Fault("denied", path="list-type"))
    assert place.sizes(list(sizes)) == sizes


def test_a_web_server_without_lists_is_asked_for_each_size(http_files: HttpFiles) -> None:
    (http_files.root / "v00").mkdir()
    (http_files.root / "v00" / "one").write_bytes(b"123")
    assert open_place(f"{http_files.url}").sizes(["v00/one", "v00/two", "v01/one"]) == {"v00/one": 3}


def test_a_web_server_that_stalls_is_asked_again(http_files: HttpFiles) -> None:
    (http_files.root / "file").write_bytes(CONTENT[:300_000])
    counts.take()
    with FaultProxy(http_files.url) as proxy:
        proxy.inject(Fault("stall", times=1, after=1000, seconds=60))
        place = open_place(proxy.url, Access(retry_seconds=20.0, connect_seconds=5.0, read_seconds=1.0))
        assert place.read_range("file", 1000, 200_000) == CONTENT[1000:201_000]
    assert counts.take() == {"timeout": 1}


def test_a_web_server_that_fails_is_not_taken_for_one_without_the_file(http_files: HttpFiles) -> None:
    (http_files.root / "file").write_bytes(b"123")
    counts.take()
    with FaultProxy(http_files.url) as proxy:
        proxy.inject(Fault("slow_down", times=4))  # fsspec asks for a size twice: by HEAD, then by GET
        place = open_place(proxy.url, Access(retry_seconds=60.0))
        assert place.size("file") == 3
        assert counts.take() == {"throttled": 2}
        proxy.inject(Fault("server_error"))
        with pytest.raises(StorageError, match=r"500.*storage\.retry_seconds"):
            open_place(proxy.url, Access(retry_seconds=0.0)).sizes(["file"])
        proxy.inject(Fault("denied"))
        with pytest.raises(AccessError, match="file: access denied"):
            place.exists("file")
        proxy.inject()
        assert not place.exists("other")


def test_what_a_client_refuses_for_good_is_an_os_error() -> None:
    class ClientResponseError(Exception):
        status = 400

    ClientResponseError.__module__ = "aiohttp.client_exceptions"

    def ask() -> None:
        raise ClientResponseError("Bad Request")

    with pytest.raises(OSError, match="http://host/file: Bad Request"):
        retrying(ask, "http://host/file", 10.0)


def test_the_first_creates_a_file_and_nobody_after_it(place: Place) -> None:
    place.make()
    assert place.create("once", b"mine")
    assert not place.create("once", b"another's")
    assert place.read("once") == b"mine"


@pytest.mark.parametrize("place", ["local", "memory", "added"], indirect=True)  # Swift checks, then writes
def test_one_of_many_creates_a_file(place: Place) -> None:
    place.make()
    answers: dict[int, bool] = {}

    def create(index: int) -> None:
        answers[index] = place.create("once", b"by %d" % index)

    threads = [threading.Thread(target=create, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [index for index, created in answers.items() if created]
    assert (len(answers), len(winners)) == (6, 1)
    assert place.read("once") == b"by %d" % winners[0]


def test_a_file_whose_writing_fails_is_not_there(place: Place) -> None:
    place.make()

    def write_half() -> None:
        with place.writing("half") as file:
            file.write(CONTENT)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    assert not place.exists("half")


def test_a_place_travels_to_another_process(place: Place) -> None:
    place.make()
    place.write("name", b"content")
    assert pickle.loads(pickle.dumps(place)) == place
    assert pickle.loads(pickle.dumps(place)).read("name") == b"content"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault("slow_down", times=4), "throttled"),
        (Fault("server_error", times=3), "server"),
        (Fault("reset", times=3), "connection"),
        (Fault("cut", method="GET", times=2, after=1000), "cut"),
        (Fault("cut", method="GET", times=2, after=1000, rst=True), "cut"),
        (Fault("stall", method="GET", times=1, after=1000, seconds=5), "timeout"),
        (Fault("whole", method="GET", times=2), "short"),
    ],
    ids=lambda value: value.kind + ("_rst" if value.rst else "") if isinstance(value, Fault) else "",
)
def test_requests_that_fail_are_tried_again_and_counted(
    behind: tuple[Place, FaultProxy], fault: Fault, cause: str
) -> None:
    place, proxy = behind
    place.write("file", CONTENT[:1_000_000])
    assert counts.take() == {}
    times = fault.times
    proxy.inject(replace(fault))  # the proxy counts in it
    buffer = bytearray(200_000)
    place.read_into("file", 50_000, memoryview(buffer))
    assert buffer == CONTENT[50_000:250_000]
    found = counts.take()
    assert found.get(cause, 0) >= 1, found
    # aiohttp sends a request again by itself when the connection it kept turns out to be closed.
    assert sum(found.values()) == times or fault.kind == "reset", found


def test_an_upload_in_parts_survives_failing_requests(behind: tuple[Place, FaultProxy]) -> None:
    place, proxy = behind
    proxy.inject(Fault("slow_down", chance=0.3, times=6), Fault("reset", chance=0.3, times=6))
    write(place, "large", CONTENT * 2)
    proxy.inject()
    assert b"".join(place.chunks("large")) == CONTENT * 2


def test_an_upload_whose_last_answer_is_lost_is_complete(behind: tuple[Place, FaultProxy]) -> None:
    place, proxy = behind
    proxy.inject(Fault("lost", method="POST", path="uploadId", times=1))
    write(place, "large", CONTENT * 2)
    assert proxy.injected == {"lost": 1}
    assert place.size("large") == 2 * len(CONTENT)


def test_a_file_is_ours_if_only_the_answer_was_lost(behind: tuple[Place, FaultProxy]) -> None:
    place, proxy = behind
    proxy.inject(Fault("lost", method="PUT", times=1))
    assert place.create("once", b"mine")
    assert not place.create("once", b"another's")
    assert (proxy.injected, place.read("once")) == ({"lost": 1}, b"mine")


def test_a_store_that_fails_for_good_is_named_with_the_limit(
    behind: tuple[Place, FaultProxy], object_store: ObjectStore
) -> None:
    place, proxy = behind
    proxy.inject(Fault("slow_down"))
    patient = open_place(str(place), store_access(object_store, proxy.url, retry_seconds=1.0))
    with pytest.raises(StorageError, match=r"place/file.*Raise storage\.retry_seconds"):
        patient.read("file")


def test_wrong_credentials_are_one_error_at_once(object_store: ObjectStore) -> None:
    wrong = store_access(object_store, secret="not-the-secret")
    place = open_place(f"s3://{object_store.new_bucket()}/place", wrong)
    counts.take()
    for action in (lambda: place.read("file"), lambda: place.list(), lambda: place.create("file", b"")):
        with pytest.raises(AccessError, match="Check the credentials in the environment") as raised:
            action()
        assert "not-the-secret" not in str(raised.value)
    assert counts.take() == {}


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/folder",
        "https://host/folder?token=secret",
        "simplecache::s3://bucket/folder",
        "pipe:cat secret",
        "s3://",
    ],
)
def test_urls_with_credentials_or_commands_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_place(url)
    assert not any(secret in str(raised.value) for secret in ("key:secret", "token="))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s4://bucket/folder", r"data: got 's4://bucket/folder', expected .*s3://, .*https://, or another scheme"),
        (
            "s3:/bucket",
            r"data: got 's3:/bucket', expected s3:// with two slashes\. For a local .* \./s3:/bucket\.",
        ),
        ("s3:bucket", r"data: got 's3:bucket', expected s3://"),
        (
            "absent://host/folder",
            r"data: got 'absent://host/folder', expected .*package.* absent://\. Install absent-fs",
        ),
    ],
)
def test_a_scheme_that_nothing_reaches_is_refused_in_one_line_before_any_request(
    url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"class": "no_such_package.FileSystem", "err": "Install absent-fs to access it"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(ConfigError, match=said) as raised:
        load_recipe(PretrainingConfig, None, [f"data={url}", "run=somewhere"])
    assert "\n" not in str(raised.value)


def test_a_missing_setting_of_a_store_is_named() -> None:
    with pytest.raises(ConfigError, match=r"storage\.options\.filecache: got {}, expected .*target_protocol"):
        open_place("filecache://folder").list()


def test_paths_and_urls_are_told_apart() -> None:
    assert all(map(is_url, ("s3://b/k", "http://h/k", "memory://k", "gs://b")))
    assert not any(map(is_url, ("folder", "/folder/a:b", "file:///folder", "./s3:/b")))
    assert open_place("file:///some/folder") == LocalPlace(Path("/some/folder"))
    assert open_place("./s3:/b") == LocalPlace(Path("s3:/b"))
    assert open_place("S3://bucket/Key") == open_place("s3://bucket/Key")
