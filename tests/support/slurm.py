"""A real SLURM for tests: a controller and some hosts on one machine, in one folder.

Debian builds slurmd with ``--enable-multiple-slurmd``, so several run side by side, each under its own name.
By default all are on loopback. Else each host has a network and a name, so that it can be killed or cut off.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from support.networks import Networks
from support.object_store import Unavailable
from support.ports import free_ports

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_START_SECONDS = 60
_GPUS = 2  # of each host: other devices stand for them
# No cgroups and no accounting. A job that is put back waits `cred_expire` seconds before it starts again.
_CONFIG = """\
ClusterName=tests
SlurmctldHost={host}({head})
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=1
ReturnToService=2
SlurmdTimeout={silence}
MessageTimeout=5
TCPTimeout=2
KillWait={patience}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A running cluster of the hosts n0, n1 and so on.

    Args:
        folder: where its configuration, logs and state are; a short path, since it holds a socket.
        hosts: how many.
        networks: of the hosts, if each has its own.
    """

    def __init__(self, folder: Path, hosts: int = 2, networks: Networks | None = None) -> None:
        self.folder, self.networks = folder, networks
        self.hosts = [f"n{index}" for index in range(hosts)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def inside(self, command: list[str] | tuple[str, ...], host: str | None = None) -> list[str]:
        """The command in the network of a host, by default the controller's."""
        return list(command) if self.networks is None else self.networks.inside(command, host)

    def __call__(self, *command: str, **environment: str) -> str:
        """Run a command of SLURM; what it prints."""
        found = subprocess.run(
            self.inside(command),
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if found.returncode:
            raise RuntimeError(f"{' '.join(command)}: {found.stdout}{found.stderr}")
        return found.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, host: str) -> str:
        """The state of a host: ``idle``, ``alloc``, ``down*``, ..."""
        return self("sinfo", "--noheader", "--Node", "--partition=main", f"--nodes={host}", "--format=%t").strip()

    @property
    def idle(self) -> bool:
        """Whether all hosts are up and free."""
        with contextlib.suppress(RuntimeError):
            return [self.state(host) for host in self.hosts] == ["idle"] * len(self.hosts)
        return False

    def processes(self, host: str) -> list[psutil.Process]:
        """The ranks on a host with a network of its own, without the processes that load their data."""
        assert self.networks is not None
        found = []
        for process in self.networks.processes(host):
            with contextlib.suppress(psutil.Error):
                words, parent = process.cmdline(), process.parent()
                ranks_own = parent is not None and "slurmstepd" in parent.name()
                if "beit_dist.train" in words and "--preflight" not in words and ranks_own:
                    found.append(process)
        return found

    def boot(self, host: str) -> None:
        """Start the daemon of a host."""
        self._start(host, "slurmd", "-D", "-f", f"{self.folder}/slurm.conf", "-N", host)

    def kill(self, host: str) -> None:
        """As if the power went: nothing on the host ends in order, and its peers hear nothing."""
        assert self.networks is not None
        self.networks.cut(host)
        while left := self.networks.processes(host):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self.daemons.pop(host).wait()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        # The kernel ends the daemons with the tests, however those end.
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [str(_path(program)), *arguments]
        if self.networks is not None and name in self.hosts:
            command = self.networks.as_host(command, name)
        with (self.folder / "output").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [*guard, *self.inside(command, name if name in self.hosts else None)],
                stdout=output,
                stderr=output,
                env=self.environment,
                cwd=self.folder,
            )

    def start(self) -> None:
        """Start all daemons.

        Raises:
            Unavailable: they do not come up.
        """
        munge = {name: f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "log", "seed")}
        socket_path = self.folder / "munge" / "socket"
        self._start("munge", "munged", "--foreground", "--force", f"--socket={socket_path}", *munge.values())
        self._until(socket_path.exists)
        self._start("controller", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        for host in self.hosts:
            self.boot(host)
        self._until(lambda: self.idle)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not condition():
            if time.monotonic() > deadline or any(d.poll() is not None for d in self.daemons.values()):
                logs = [p for p in self.folder.rglob("*") if p.suffix == ".log" or p.name in ("output", "log")]
                said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)
                raise Unavailable(f"SLURM did not come up in {_START_SECONDS} s: {said}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End all daemons, and whatever still runs in the cluster."""
        for process in [*_left(self.folder), *self.daemons.values()]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait()


@contextlib.contextmanager
def running(hosts: int = 2, *, networks: bool = False) -> Iterator[Slurm]:
    """Start a cluster; it ends, with whatever still runs in it, when the block does.

    Args:
        hosts: how many.
        networks: each has a network and a name of its own, for which root is needed.

    Raises:
        Unavailable: programs or rights are missing, or the hosts do not come up.
    """
    missing = [program for program in _PROGRAMS if _path(program) is None]
    if missing:
        raise Unavailable(
            f"SLURM: {', '.join(missing)} not found (apt-get install --no-install-recommends slurm-wlm munge)"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with contextlib.ExitStack() as ended:
        ended.callback(shutil.rmtree, folder, ignore_errors=True)
        names = [f"n{index}" for index in range(hosts)]
        own = ended.enter_context(Networks(names, folder)) if networks else None
        slurm = Slurm(folder, hosts, own)
        _configure(slurm)
        ended.callback(slurm.stop)
        slurm.start()
        yield slurm


def _configure(slurm: Slurm) -> None:
    folder = slurm.folder
    for name in ("munge", "state", *slurm.hosts):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").touch(0o600)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().split(".")[0]
    controller, *ports = free_ports(1 + len(slurm.hosts))
    nodes = []
    for name, port in zip(slurm.hosts, ports, strict=True):
        address = "127.0.0.1" if slurm.networks is None else slurm.networks.address(name)
        named = host if slurm.networks is None else name
        nodes.append(
            f"NodeName={name} NodeHostname={named} NodeAddr={address} Port={port} CPUs=2 RealMemory=1000 "
            f"Gres=gpu:{_GPUS} State=UNKNOWN"
        )
    text = _CONFIG.format(
        folder=folder,
        host=host,
        head="127.0.0.1" if slurm.networks is None else slurm.networks.address(None),
        controller=controller,
        patience=120 if slurm.networks is None else 10,  # seconds in which ranks may save
        silence=300 if slurm.networks is None else 15,
        user=getpass.getuser(),
        nodes="\n".join(nodes),
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for index in range(_GPUS):
        with contextlib.suppress(PermissionError):  # then SLURM only counts them
            os.mknod(folder / f"nvidia{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    devices = f"File={folder}/nvidia[0-{_GPUS - 1}]" if (folder / "nvidia0").exists() else f"Count={_GPUS}"
    (folder / "gres.conf").write_text(f"Name=gpu Flags=nvidia_gpu_env {devices}\n")


def _left(folder: Path) -> list[psutil.Process]:
    """Processes that belong to the cluster: its jobs and their keepers know its configuration."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf") and process.pid != os.getpid():
                found.append(process)
    return found


def _path(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")
