"""Hosts with a network of their own on one machine: namespaces of the kernel around a bridge; for root alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from support.object_store import Unavailable

_HEAD = "head"
# Of namespaces that nothing connects to the machine's own network, so that any addresses do.
_ADDRESSES = "10.77.0.{}"
_AS_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class Networks:
    """A network of hosts, and of a head that the bridge is in; gone at the end of a ``with`` block.

    Args:
        hosts: their names.
        folder: for a file of names and addresses.

    Raises:
        Unavailable: this user, or this machine, cannot make any.
    """

    def __init__(self, hosts: Sequence[str], folder: Path) -> None:
        self._hosts, self._names = list(hosts), folder / "hosts"
        self._prefix = f"beit{os.getpid()}{folder.name[-4:]}"

    def __enter__(self) -> Networks:
        if os.getuid() != 0:
            raise Unavailable("networks of their own for the hosts: only root can make them")
        if missing := [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]:
            raise Unavailable(f"{', '.join(missing)} not found (apt-get install iproute2 util-linux)")
        lines = [f"{self.address(host)} {host}" for host in self._hosts]
        self._names.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise Unavailable(f"networks of their own for the hosts: {error.stderr.decode()}") from None
        return self

    def __exit__(self, *_: object) -> None:
        for host in (*self._hosts, None):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self._space(host))

    def _make(self) -> None:
        head = self._space(None)
        _ip("netns", "add", head)
        for words in (["lo", "up"], ["add", "br0", "type", "bridge"], ["br0", "up"]):
            _ip("-n", head, "link", *(words if words[0] == "add" else ["set", *words]))
        _ip("-n", head, "addr", "add", f"{self.address(None)}/24", "dev", "br0")
        for host in self._hosts:
            space = self._space(host)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", head, "link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", head, "link", "set", f"to-{host}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def address(self, host: str | None) -> str:
        """Of a host; None is the head."""
        return _ADDRESSES.format(1 if host is None else 11 + self._hosts.index(host))

    def inside(self, command: Sequence[str], host: str | None) -> list[str]:
        """The command in a host's network."""
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", "--", *command]

    def as_host(self, command: Sequence[str], host: str) -> list[str]:
        """The command under a host's name, knowing those of the others."""
        return ["unshare", "--mount", "--uts", "sh", "-c", _AS_HOST, "sh", host, str(self._names), *command]

    def cut(self, host: str) -> None:
        """Unplug a host's cable."""
        _ip("-n", self._space(None), "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Plug it in again."""
        _ip("-n", self._space(None), "link", "set", f"to-{host}", "up")

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs on a host."""
        found: list[Any] = []
        for number in _ip("netns", "pids", self._space(host)).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(number))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _space(self, host: str | None) -> str:
        return f"{self._prefix}-{host or _HEAD}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60).stdout.decode()
