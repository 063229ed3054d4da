"""A real object store for tests: OpenStack Swift with its S3 interface, in one folder, on loopback, by any user.

Swift lives in a virtual environment of its own, which ``make servers`` makes: it pins other versions than ours.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.config
import botocore.session
from support.ports import free_ports

ROOT = Path(__file__).parents[2]
_BACKENDS = ("account", "container", "object")
_START_SECONDS = 60

_SWIFT = """\
[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = only
default = yes
"""
_DEFAULT = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
workers = 0
log_level = WARNING
"""
_BACKEND = """\
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
# An S3 upload may have 10000 parts; Swift's own limits are lower.
_PROXY = """\
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:s3api]
use = egg:swift#s3api
location = {region}
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_{account} = {secret} .admin
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
"""
_PLAIN_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "copy")
_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for kind, port in zip(sys.argv[2::2], sys.argv[3::2]):
    ring = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
    ring.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "disk", "weight": 1.0})
    ring.rebalance()
    ring.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""


class Unavailable(Exception):  # noqa: N818
    """What is missing for a server, and how to get it."""


class ObjectStore:
    """A running store.

    Attributes:
        endpoint_url: where it listens.
        key, secret: credentials that may do everything. The secret is new for each store: one can look for it.
        region: that requests must be signed for.
        folder: where it keeps everything; its log is ``server.log``.
        processes: by name: memcached, account, container, object, proxy. Tests may stop one to break the store.
    """

    key, region = "beit:tests", "us-east-1"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = secrets.token_hex(16)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = dict(zip(("proxy", "memcached", *_BACKENDS), free_ports(5), strict=True))
        self.endpoint_url = f"http://127.0.0.1:{self._ports['proxy']}"

    def new_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"bucket-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self, **options: Any) -> Any:
        """botocore's plain S3 client, without retries: a second opinion on what lies in the store.

        Args:
            options: in place of those of this store: ``endpoint_url``, ``aws_secret_access_key`` ...
        """
        settings = {
            "endpoint_url": self.endpoint_url,
            "aws_access_key_id": self.key,
            "aws_secret_access_key": self.secret,
            "region_name": self.region,
            "config": botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=30),
        }
        return botocore.session.Session().create_client("s3", **{**settings, **options})

    def environment(self, endpoint_url: str = "") -> dict[str, str]:
        """The variables by which other programs, s3fs too, find the store: directly, or by way of a proxy."""
        return {
            "AWS_ENDPOINT_URL": endpoint_url or self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": self.region,
        }

    def whole(self, path: str) -> bytes:
        """The file at ``/bucket/key``; for :class:`support.fault_proxy.FaultProxy`."""
        bucket, _, key = urllib.request.url2pathname(path).lstrip("/").partition("/")
        content: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def start(self) -> None:
        """Write the settings, start the servers and wait until they answer.

        Raises:
            Unavailable: a program is missing, or the disk cannot hold what Swift notes at each file.
        """
        python, memcached = _python(), shutil.which("memcached")
        if memcached is None:
            raise Unavailable("memcached is not installed; apt-get install memcached")
        (self.folder / "devices" / "disk").mkdir(parents=True)
        try:
            os.setxattr(self.folder, "user.test", b"x" * 1000)
        except OSError as error:
            raise Unavailable(f"{self.folder} takes no extended attributes ({error}); set TMPDIR") from None
        self._write_settings(python)
        user = ["-u", "root"] if os.geteuid() == 0 else []
        self._spawn("memcached", [memcached, "-l", "127.0.0.1", "-p", str(self._ports["memcached"]), *user])
        for kind in (*_BACKENDS, "proxy"):
            server = python.with_name(f"swift-{kind}-server")
            self._spawn(kind, [str(python), str(server), str(self.folder / f"{kind}.conf"), "-v"])
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                log = (self.folder / "server.log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"the object store does not answer; ended: {ended}\n{log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the servers and remove the folder."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_settings(self, python: Path) -> None:
        (self.folder / "swift.conf").write_text(_SWIFT)
        for kind in (*_BACKENDS, "proxy"):
            text = _DEFAULT.format(port=self._ports[kind], user=getpass.getuser(), folder=self.folder)
            if kind == "proxy":
                text += "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _PLAIN_FILTERS)
                account = self.key.replace(":", "_")
                text += _PROXY.format(
                    memcached=self._ports["memcached"], region=self.region, account=account, secret=self.secret
                )
            else:
                text += _BACKEND.format(kind=kind)
            (self.folder / f"{kind}.conf").write_text(text)
        ports = [word for kind in _BACKENDS for word in (kind, str(self._ports[kind]))]
        subprocess.run([python, "-c", _RINGS, self.folder, *ports], check=True, capture_output=True)

    def _spawn(self, name: str, command: list[str]) -> None:
        # The kernel ends the servers with the tests, however those end.
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with open(self.folder / "server.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*guard, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _answers(self) -> bool:
        """Whether all servers listen and a request goes through all of them."""
        try:
            for port in self._ports.values():
                socket.create_connection(("127.0.0.1", port), 1).close()
            with contextlib.closing(self.client()) as client:
                client.list_buckets()
        except Exception:
            return False
        return True


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ObjectStore]:
    """A store in ``folder``, which must be empty and is removed at the end."""
    store = ObjectStore(folder)
    try:
        store.start()
        yield store
    finally:
        store.stop()


def _python() -> Path:
    found = Path(os.environ.get("BEIT_SWIFT_PYTHON") or ROOT / ".venv-swift" / "bin" / "python")
    if not found.with_name("swift-proxy-server").exists():
        raise Unavailable(f"no OpenStack Swift beside {found}; `make servers` installs it")
    return found.absolute()
