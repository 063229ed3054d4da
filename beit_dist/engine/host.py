"""``--preflight``: whether this host can take part in a run, in the seconds before any rank starts there.

A bad host among many is named here in one line, rather than by ranks that wait for those that it could not start.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from beit_dist.config.environment import number
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.run import RunConfig
from beit_dist.engine.run_folder import CLOCKS, RunFolder
from beit_dist.errors import PreflightError, UserError
from beit_dist.shards.manifest import MANIFEST_NAME
from beit_dist.storage.durable import check_takes_files, temporary_path
from beit_dist.storage.opening import place_of
from beit_dist.storage.place import is_url, shown

_PACKAGES = ("deepspeed", "torchdata", "safetensors", "prometheus_client")
_ROOM = 2**26
"""Bytes that a host's folder for temporary files must have free: sockets, compiled code, NCCL's files."""


def check_host(config: RunConfig, device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Look at this host, once for all ranks that it will have; nothing is left on it.

    Args:
        config: the recipe of the run.
        device: what ``--device`` says.
        environment: of the launcher: where the ranks will meet, and the GPUs that SLURM has given.

    Raises:
        PreflightError: what is wrong, all of it, with the host's name.
    """
    checks: list[Callable[[], Iterator[str]]] = [
        _packages,
        lambda: _run_folder(config),
        lambda: _data(config),
        lambda: _local_folders(config),
        lambda: _gpus(device, environment),
        lambda: _meeting(environment),
    ]
    faults: list[str] = []
    for check in checks:
        try:
            faults += check()
        except (UserError, OSError) as error:
            faults.append(str(error).rstrip("."))
    if faults:
        host = environment.get("SLURMD_NODENAME") or socket.gethostname()
        raise PreflightError(f"preflight: host {host}: {'; '.join(faults)}")


def _packages() -> Iterator[str]:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield f"Python has no {', '.join(missing)}, expected the packages of the other hosts"
    try:
        import torch  # noqa: F401  # what breaks on a single host are libraries that it loads
    except (ImportError, OSError) as error:
        yield f"PyTorch cannot be imported: {error}"


def _run_folder(config: RunConfig) -> Iterator[str]:
    run = RunFolder(config.run, config.storage.access)
    run.check_writable()
    if not run.place.is_local:
        return
    there = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    if not shutil.disk_usage(there).free:
        yield f"run: no space is left for {config.run}"
    difference = clock_difference(there)
    if abs(difference) > CLOCKS / 2:
        yield (
            f"its clock differs by {difference:+.1f} s from that of the file system of {config.run}, expected at "
            f"most {CLOCKS / 2:g} s: synchronise it (NTP)"
        )


def clock_difference(folder: Path) -> float:
    """Seconds by which this host is ahead of what keeps a folder's files; 0 within what a file takes to make."""
    probe = temporary_path(folder / "clock")
    before = time.time()
    try:
        probe.touch(exist_ok=False)
        made = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    # A local file's time is the last tick's of the kernel: a little early.
    return 0.0 if before - 0.1 <= made <= time.time() else before - made


def _data(config: RunConfig) -> Iterator[str]:
    for field, named in (("data", config.data), ("validation.data", config.validation.data)):
        for where in [named] if isinstance(named, str) else named or ():
            if where == "auto":
                continue
            if field == "data" and isinstance(config, PretrainingConfig):
                where = f"{where.rstrip('/')}/{MANIFEST_NAME}"
            if is_url(where):
                place, name = place_of(where, config.storage.access)
                found = place.exists(name) or not name.endswith(MANIFEST_NAME)
            else:
                path = where.removeprefix("file://")
                found = os.access(path, os.R_OK) or bool(glob.glob(path))
            if not found:
                yield f"{field}: {shown(where) if is_url(where) else where} is not there, or cannot be read"


def _local_folders(config: RunConfig) -> Iterator[str]:
    temporary = Path(tempfile.gettempdir())
    check_takes_files(temporary)
    if (free := shutil.disk_usage(temporary).free) < _ROOM:
        yield f"{free / 2**20:.0f} MiB are free in {temporary}, expected at least {_ROOM / 2**20:.0f} MiB"
    if isinstance(config, PretrainingConfig) and config.loader.cache_dir is not None:
        cache = Path(config.loader.cache_dir).absolute()
        check_takes_files(next(path for path in (cache, *cache.parents) if path.exists()))


def _gpus(device: str, environment: Mapping[str, str]) -> Iterator[str]:
    wanted = number(environment, "SLURM_GPUS_ON_NODE", 0, 1024) or 0
    if "cpu" in (device, environment.get("DS_ACCELERATOR")) or not wanted:
        return
    import torch

    if (seen := torch.cuda.device_count()) < wanted:
        yield f"PyTorch sees {seen} of the {wanted} GPUs that SLURM has given to the job here: look at nvidia-smi"


def _meeting(environment: Mapping[str, str]) -> Iterator[str]:
    address, port = environment.get("MASTER_ADDR"), number(environment, "MASTER_PORT", 1, 65535)
    if not address or port is None:
        return
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield f"MASTER_ADDR: {address}, where the ranks are to meet, cannot be looked up ({error.strerror})"
    if environment.get("SLURM_NODEID", "0") == "0":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                yield f"MASTER_PORT: port {port}, where the ranks are to meet, cannot be had ({error.strerror})"
