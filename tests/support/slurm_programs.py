"""Small programs in the place of SLURM's and of Python, with which the scripts of ``cluster/slurm`` are run."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "slurm"

# srun: notes its arguments and the rendezvous, then does what $BEHAVIOUR says. So does a worker's Python.
SRUN = """#!/usr/bin/env bash
if [[ ${*: -1} == true || ${*: -1} == --preflight ]]; then
  # A step on one node gets neither all GPUs of the job, nor the environment where SLURM_EXPORT_ENV=NONE.
  [[ -z ${SLURM_GPUS:-}${SLURM_NTASKS_PER_NODE:-} && " $* " == *" --export=ALL "* ]] || exit 1
fi
[[ ${*: -1} == true ]] && { echo step >> unused.steps; exit; }
[[ ${*: -1} == --preflight ]] && { printf '%s\\n' "$@" > preflight.called; exit "${UNFIT:-0}"; }
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT" "$@" > srun.called
case $BEHAVIOUR in
  done) touch run/DONE ;;
  fails) exit 3 ;;
  stops) touch run/PREEMPTED ;;
  deaf)
    touch ready
    exec sleep 30 ;;
  waits)
    trap 'echo stop >> signals; touch run/PREEMPTED; exit 0' USR1
    touch ready
    for _ in $(seq 600); do sleep 0.05; done ;;  # not for ever, should no signal come
esac
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "${BEIT_WORKERS:-}" "$@" > python.called
case $BEHAVIOUR in
  fails) exit 3 ;;
  waits)
    touch ready
    exec sleep 30 ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && printf 'node7\\nnode8\\n'
[[ $2 == show ]] && echo "JobId=41016 $FACTS Reason=None"
[[ $1 == requeue ]] && echo "$2" >> requeued
exit 0
"""
SQUEUE = """#!/usr/bin/env bash
cat queue
"""


def place_programs(folder: Path) -> None:
    """Write them into a folder to submit from, beside an empty run folder."""
    (folder / "run").mkdir()
    (folder / "queue").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def start(
    job: Path,
    behaviour: str,
    without: Collection[str] = (),
    script: str = "pretrain",
    arguments: Collection[str] = ("optimizer.lr=1e-3",),
    **settings: str,
) -> subprocess.Popen[str]:
    """A copy of the script as slurmd would start it, without some of the variables."""
    copy = shutil.copy(FOLDER / f"{script}.sbatch", job / "slurm_script")
    environment = {
        "PATH": f"{job}:{os.environ['PATH']}",
        "BEHAVIOUR": behaviour,
        "BEIT_SLURM": str(FOLDER),
        "RUN": "run",
        "SLURM_SUBMIT_DIR": str(job),
        "SLURM_JOB_ID": "41016",
        "FACTS": "JobState=RUNNING EndTime=2026-11-28T09:06:09 PreemptTime=None",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "8",
        **settings,
    }
    environment = {name: value for name, value in environment.items() if name not in without}
    command = ["bash", str(copy), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=job, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def until_ready(job: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the stand-in for the ranks runs."""
    while not (job / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output
