"""``cluster/slurm/pretrain.sbatch`` run by bash, with small programs in the place of ``srun`` and ``scontrol``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm" / "pretrain.sbatch"

# srun: notes its arguments and the rendezvous, then does what $BEHAVIOUR says.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT" "$@" > srun.called
case $BEHAVIOUR in
  done) touch run/DONE ;;
  fails) exit 3 ;;
  stops) touch run/PREEMPTED ;;
  waits)
    trap 'echo stop >> signals; touch run/PREEMPTED; exit 0' USR1
    touch ready
    for _ in $(seq 600); do sleep 0.05; done ;;  # not for ever, should no signal come
esac
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && printf 'node7\\nnode8\\n'
[[ $1 == requeue ]] && echo "$2" >> requeued
exit 0
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder to submit from, with an empty run folder and the two stand-ins."""
    (tmp_path / "run").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(job: Path, behaviour: str, without: Collection[str] = (), **settings: str) -> subprocess.Popen[str]:
    """The script as slurmd would start it, without some of the variables."""
    environment = {
        "PATH": f"{job}:{os.environ['PATH']}",
        "BEHAVIOUR": behaviour,
        "RUN": "run",
        "SLURM_SUBMIT_DIR": str(job),
        "SLURM_JOB_ID": "41016",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "8",
        **settings,
    }
    environment = {name: value for name, value in environment.items() if name not in without}
    command = ["bash", str(SCRIPT), "optimizer.lr=1e-3"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=job, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_one_rank_for_each_task_with_one_rendezvous_and_the_overrides(job: Path) -> None:
    assert ended(start(job, "done"))[0] == 0
    rendezvous, *arguments = (job / "srun.called").read_text().splitlines()
    assert rendezvous == f"node7:{10000 + 16 * 20}"
    assert arguments[arguments.index("-c") + 1] == "8", "srun does not inherit --cpus-per-task"
    assert "--kill-on-bad-exit=1" in arguments
    *given, metrics, port, override = arguments[-5:]
    assert given == ["run=run", "data=shards"]
    assert metrics == "logging.metrics_address=0.0.0.0", "Prometheus asks from another host"
    assert port == f"logging.metrics_port={10000 + 16 * 20 + 10}"
    assert override == "optimizer.lr=1e-3"
    assert not (job / "requeued").exists()


def test_ports_of_neighbouring_jobs_and_restarts_differ(job: Path) -> None:
    ports = set()
    for number in ("16", "17"):
        for restart in ("0", "1", "2"):
            ended(start(job, "done", SLURM_JOB_ID=number, SLURM_RESTART_COUNT=restart))
            ports.add((job / "srun.called").read_text().splitlines()[0])
    assert len(ports) == 6


def test_prometheus_finds_the_job_as_long_as_it_runs(job: Path) -> None:
    (job / "targets").mkdir()
    process = start(job, "waits", BEIT_TARGETS=str(job / "targets"), SLURM_RESTART_COUNT="13")
    while not (job / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    (target,) = (job / "targets").iterdir()
    labels = {"run": "run", "slurm_job_id": "41016"}
    assert target.suffix == ".json"
    assert json.loads(target.read_text()) == [{"targets": [f"node7:{10000 + 16 * 20 + 10}"], "labels": labels}]
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 0
    assert not list((job / "targets").iterdir())


def test_a_folder_of_targets_that_is_not_there_does_not_stop_the_job(job: Path) -> None:
    code, output = ended(start(job, "done", BEIT_TARGETS=str(job / "nowhere")))
    assert code == 0
    assert "warning:" in output
    assert "Prometheus will not find this job" in output


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_the_job_is_requeued(job: Path, stop: signal.Signals) -> None:
    process = start(job, "waits")
    while not (job / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(stop)
    code, output = ended(process)
    assert code == 0, output
    assert (job / "signals").read_text() == "stop\n"
    assert (job / "requeued").read_text() == "41016\n"


def test_a_run_that_fails_is_not_requeued_and_its_code_is_passed_on(job: Path) -> None:
    code, output = ended(start(job, "fails"))
    assert code == 3
    assert "not requeued" in output
    assert not (job / "requeued").exists()


@pytest.mark.parametrize("marker", ["DONE", "PREEMPTED"])
def test_a_marker_of_the_last_start_does_not_hide_a_failure(job: Path, marker: str) -> None:
    (job / "run" / marker).touch()
    assert ended(start(job, "fails"))[0] == 3
    assert not (job / "requeued").exists()


def test_the_number_of_restarts_is_bounded(job: Path) -> None:
    code, output = ended(start(job, "stops", SLURM_RESTART_COUNT="5", MAX_RESTARTS="5"))
    assert code == 0
    assert "not requeued after 5 restarts" in output
    assert not (job / "requeued").exists()


def test_an_end_without_a_marker_is_a_failure_whatever_srun_says(job: Path) -> None:
    assert ended(start(job, "nothing"))[0] == 1


def test_the_batch_shell_is_warned_in_time_and_the_job_may_be_requeued() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert options["signal"] == "B:USR1@180"
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.parametrize(
    "unset", ["SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NODELIST", "SLURM_SUBMIT_DIR", "all of them"]
)
def test_variables_that_slurm_leaves_unset_are_done_without(job: Path, unset: str) -> None:
    given = {"SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NODELIST", "SLURM_SUBMIT_DIR"}
    code, output = ended(start(job, "done", without=given if unset == "all of them" else {unset}))
    assert code == 0, output
    assert "unbound variable" not in output
    arguments = (job / "srun.called").read_text().splitlines()
    assert ("-c" in arguments) == (unset not in ("SLURM_CPUS_PER_TASK", "all of them"))
    assert "" not in arguments


def test_a_node_list_that_cannot_be_expanded_leaves_this_host_as_the_first(job: Path) -> None:
    (job / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    assert ended(start(job, "done"))[0] == 0
    address = (job / "srun.called").read_text().partition(":")[0]
    assert address == subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()


def test_outside_a_job_and_with_a_wrong_setting_it_says_so(job: Path) -> None:
    code, output = ended(start(job, "done", without={"SLURM_JOB_ID"}))
    assert (code, output) == (2, "error: SLURM_JOB_ID is not set: start this script with sbatch\n")
    code, output = ended(start(job, "done", MAX_RESTARTS="many"))
    assert code == 2
    assert "MAX_RESTARTS: got 'many'" in output
    assert not (job / "srun.called").exists()
