"""A real SLURM for tests: a controller and two nodes on one machine, on loopback, in one folder.

Debian builds slurmd with ``--enable-multiple-slurmd``, so two of them run side by side, each under its own name.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from support.object_store import Unavailable
from support.ports import free_ports

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_NODES = ("n0", "n1")
_START_SECONDS = 60
# No cgroups and no accounting. A job that is put back waits `cred_expire` seconds before it starts again.
_CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
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
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=1
ReturnToService=2
KillWait=120
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A running cluster of the nodes n0 and n1.

    Args:
        folder: where its configuration, logs and state are; a short path, since it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *command: str, **environment: str) -> str:
        """Run a command of SLURM; what it prints."""
        found = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        if found.returncode:
            raise RuntimeError(f"{' '.join(command)}: {found.stdout}{found.stderr}")
        return found.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def idle(self) -> bool:
        """Whether both nodes are up and free."""
        with contextlib.suppress(RuntimeError):
            return self("sinfo", "--noheader", "--Node", "--format", "%t").split() == ["idle", "idle"]
        return False


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """Start a cluster; it ends, with whatever still runs in it, when the block does.

    Raises:
        Unavailable: programs are missing, or the nodes do not come up.
    """
    missing = [program for program in _PROGRAMS if _path(program) is None]
    if missing:
        raise Unavailable(
            f"SLURM: {', '.join(missing)} not found (apt-get install --no-install-recommends slurm-wlm munge)"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    slurm = Slurm(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    # The kernel ends the daemons with the tests, however those end.
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    try:
        _configure(folder)
        for command in _daemons(folder):
            with (folder / "output").open("ab") as output:
                daemons.append(
                    subprocess.Popen(
                        [*guard, *command], stdout=output, stderr=output, env=slurm.environment, cwd=folder
                    )
                )
            if "munged" in command[0]:
                _until((folder / "munge" / "socket").exists, daemons, folder)
        _until(lambda: slurm.idle, daemons, folder)
        yield slurm
    finally:
        for process in [*_left(folder), *daemons]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    for name in ("munge", "state", *_NODES):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").touch(0o600)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().split(".")[0]
    controller, *ports = free_ports(1 + len(_NODES))
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
        for name, port in zip(_NODES, ports, strict=True)
    ]
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            folder=folder, host=host, controller=controller, user=getpass.getuser(), nodes="\n".join(nodes)
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _daemons(folder: Path) -> list[list[str]]:
    munge = {name: f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")}
    commands = [["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *munge.values()]]
    commands.append(["slurmctld", "-D", "-f", f"{folder}/slurm.conf"])
    commands += [["slurmd", "-D", "-f", f"{folder}/slurm.conf", "-N", name] for name in _NODES]
    return [[str(_path(program)), *arguments] for program, *arguments in commands]


def _left(folder: Path) -> list[psutil.Process]:
    """Processes that belong to the cluster: its jobs and their keepers know its configuration."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf") and process.pid != os.getpid():
                found.append(process)
    return found


def _until(condition: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            logs = [path for path in folder.rglob("*") if path.suffix == ".log" or path.name in ("output", "log")]
            said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)
            raise Unavailable(f"SLURM did not come up in {_START_SECONDS} s: {said}")
        time.sleep(0.1)


def _path(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")
