"""The scripts of ``cluster/slurm`` run by bash, with small programs in the place of SLURM's and of Python."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.slurm_programs import FOLDER, SCONTROL, ended, place_programs, start, until_ready

SCRIPTS = ("pretrain", "finetune", "tokenize", "beit")
TRAININGS = ("pretrain", "finetune")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder to submit from, with an empty run folder and the stand-ins."""
    place_programs(tmp_path)
    return tmp_path


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
    until_ready(job, process)
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


def test_targets_that_killed_jobs_of_the_run_have_left_are_removed(job: Path) -> None:
    (targets := job / "targets").mkdir()
    for number, run in ((7, "run"), (8, "run"), (9, "other")):
        content = [{"targets": ["gone:1"], "labels": {"run": run, "slurm_job_id": str(number)}}]
        (targets / f"beit-{number}.json").write_text(json.dumps(content))
    (job / "queue").write_text("8\n41016\n")
    assert ended(start(job, "done", BEIT_TARGETS=str(targets)))[0] == 0
    assert sorted(path.name for path in targets.iterdir()) == ["beit-8.json", "beit-9.json"]
    (job / "queue").unlink()  # SLURM does not answer
    assert ended(start(job, "done", BEIT_TARGETS=str(targets)))[0] == 0
    assert sorted(path.name for path in targets.iterdir()) == ["beit-8.json", "beit-9.json"]


def test_a_target_of_a_restart_elsewhere_stays_when_the_first_script_ends(job: Path) -> None:
    (targets := job / "targets").mkdir()
    process = start(job, "waits", BEIT_TARGETS=str(targets))
    until_ready(job, process)
    (target,) = targets.iterdir()
    target.write_text(restarted := target.read_text().replace("node7", "node9"))
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 0
    assert target.read_text() == restarted


def test_a_reader_of_targets_never_sees_half_a_file(job: Path) -> None:
    (targets := job / "targets").mkdir()
    target, seen = targets / "beit-41016.json", 0
    while seen < 20:
        process = start(job, "done", BEIT_TARGETS=str(targets))
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                assert json.loads(target.read_text())[0]["targets"]
                seen += 1
        process.communicate()
        assert not list(targets.iterdir())


def test_a_host_that_is_not_fit_ends_the_job_before_the_ranks_start(job: Path) -> None:
    code, output = ended(start(job, "done", UNFIT="2", SLURM_JOB_NUM_NODES="2"))
    assert code == 2
    assert "preflight failed with exit code 2, not started and not requeued" in output
    assert not (job / "srun.called").exists()
    assert not (job / "requeued").exists()
    arguments = (job / "preflight.called").read_text().splitlines()
    assert {"--ntasks=2", "--ntasks-per-node=1", "run=run", "optimizer.lr=1e-3"} <= set(arguments), "the recipe's"
    assert ended(start(job, "done", UNFIT="2", PREFLIGHT="no"))[0] == 0


def test_a_run_folder_of_another_job_that_is_queued_or_runs_is_refused(job: Path) -> None:
    assert ended(start(job, "done"))[0] == 0
    (job / "queue").write_text("41010 beit-finetune RUNNING\n41016 beit RUNNING\n")
    (job / "srun.called").unlink()
    code, output = ended(start(job, "done", SLURM_JOB_ID="41017"))
    assert code == 2
    assert (
        "error: RUN: run belongs to job 41016 (beit RUNNING). Wait for its end, cancel it (scancel 41016)"
        in output
    )
    assert not (job / "srun.called").exists()
    assert ended(start(job, "done", SLURM_RESTART_COUNT="3"))[0] == 0, "its own restart"
    (job / "queue").write_text("41010 beit-finetune RUNNING\n41017 beit RUNNING\n")
    assert ended(start(job, "done", SLURM_JOB_ID="41017"))[0] == 0, "the one before has ended"
    assert (job / "run" / "slurm-jobs").read_text() == "41017\n"


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_the_job_is_requeued(job: Path, stop: signal.Signals) -> None:
    process = start(job, "waits")
    until_ready(job, process)
    process.send_signal(stop)
    code, output = ended(process)
    assert code == 0, output
    assert (job / "signals").read_text() == "stop\n"
    assert (job / "requeued").read_text() == "41016\n"


@pytest.mark.parametrize("script", ["pretrain", "tokenize"])
def test_a_signal_before_anything_has_started_puts_the_job_back(job: Path, script: str) -> None:
    (job / "scontrol").write_text(
        "#!/usr/bin/env bash\ntouch asked; while [ ! -e go ]; do sleep 0.05; done\n" + SCONTROL
    )
    process = start(job, "done", script=script, **ARRAY)
    while not (job / "asked").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    (job / "go").touch()
    code, output = ended(process)
    assert code == 0, output
    assert (job / "requeued").exists(), output
    assert not (job / "srun.called").exists()
    assert not (job / "python.called").exists()


@pytest.mark.parametrize("script", ["pretrain", "tokenize"])
def test_a_job_that_was_cancelled_does_not_come_back(job: Path, script: str) -> None:
    def stopped(facts: str, number: signal.Signals = signal.SIGTERM) -> str:
        (job / "ready").unlink(missing_ok=True)
        (job / "requeued").unlink(missing_ok=True)
        process = start(job, "waits", script=script, **{**ARRAY, "FACTS": f"JobState=COMPLETING {facts}"})
        until_ready(job, process)
        process.send_signal(number)
        return ended(process)[1]

    time_of_day = "2026-11-28T09:06:09"
    assert "puts it back itself unless it was cancelled" in stopped(f"EndTime={time_of_day} PreemptTime=None")
    assert not (job / "requeued").exists()
    for facts, number in (
        ("EndTime=Unknown PreemptTime=None", signal.SIGTERM),  # SLURM puts it back
        (f"EndTime={time_of_day} PreemptTime={time_of_day}", signal.SIGTERM),
        (f"EndTime={time_of_day} PreemptTime=None", signal.SIGUSR1),  # its time is over
    ):
        stopped(facts, number)
        assert (job / "requeued").exists(), facts


@pytest.mark.parametrize("script", ["pretrain", "tokenize"])
def test_a_script_of_a_host_that_was_cut_off_leaves_the_restart_alone(job: Path, script: str) -> None:
    for restarts, back in (("1", False), ("0", True)):
        (job / "ready").unlink(missing_ok=True)
        process = start(job, "waits", script=script, **{**ARRAY, "FACTS": f"JobState=RUNNING Restarts={restarts}"})
        until_ready(job, process)
        process.send_signal(signal.SIGUSR1)
        ended(process)
        assert (job / "requeued").exists() is back


def test_steps_of_ranks_have_other_numbers_than_those_of_the_last_two_starts(job: Path) -> None:
    numbers = []
    for restart in range(6):
        (job / "unused.steps").write_text("")
        asked = {"SLURM_GPUS": "16", "SLURM_NTASKS_PER_NODE": "8"}
        assert ended(start(job, "done", SLURM_RESTART_COUNT=str(restart), **asked))[0] == 0
        numbers.append((job / "unused.steps").read_text().count("step"))
    assert all(len(set(numbers[first : first + 3])) == 3 for first in range(4))


def test_a_signal_that_ends_ranks_which_do_not_listen_yet_requeues_the_job(job: Path) -> None:
    process = start(job, "deaf")
    until_ready(job, process)
    process.send_signal(signal.SIGUSR1)
    code, output = ended(process)
    assert code == 0, output
    assert "stopped before the ranks could save" in output
    assert (job / "requeued").exists()


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


def test_a_job_that_slurm_has_put_back_too_often_does_not_start(job: Path) -> None:
    code, output = ended(start(job, "done", SLURM_RESTART_COUNT="6", MAX_RESTARTS="5"))
    assert code == 1
    assert "not started, after 6 restarts" in output
    assert not (job / "srun.called").exists()


def test_an_end_without_a_marker_is_a_failure_whatever_srun_says(job: Path) -> None:
    assert ended(start(job, "nothing"))[0] == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_batch_shell_is_warned_in_time_and_the_job_may_be_requeued(script: str) -> None:
    text = (FOLDER / f"{script}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert "requeue" in options
    assert options["open-mode"] == "append"
    if script in TRAININGS:
        assert options["signal"] == "B:USR1@180"
        assert options["ntasks-per-node"] == options["gpus-per-node"]
    elif script == "tokenize":
        assert options["signal"].startswith("B:USR1@")
        assert options["array"].startswith("0-")


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


@pytest.mark.parametrize("given", ["run=other", "--run", "--run=run"])
def test_a_run_folder_that_the_script_does_not_know_of_is_refused(job: Path, given: str) -> None:
    code, output = ended(start(job, "done", arguments=["steps=9", given]))
    assert code == 2
    assert f"error: got the argument '{given}', but the script looks into run. Set RUN" in output
    assert not (job / "srun.called").exists()
    assert ended(start(job, "done", arguments=["run=run"]))[0] == 0


@pytest.mark.parametrize("script", TRAININGS)
def test_names_of_folders_may_have_spaces(job: Path, script: str) -> None:
    targets = job / "all targets" / "train"
    targets.mkdir(parents=True)
    names = {"RUN": "a run", "DATA": "some data", "TEST": "more data", "INIT_FROM": "", "RECIPE": "my recipe.yaml"}
    code, output = ended(start(job, "fails", script=script, BEIT_TARGETS=str(targets.parent), **names))
    assert code == 3
    assert "run folder a run" in output
    assert {"run=a run", "data=some data", "my recipe.yaml"} <= set((job / "srun.called").read_text().splitlines())
    assert (job / "a run" / "slurm-jobs").read_text() == "41016\n"
    assert not list(targets.iterdir())


def test_fine_tuning_has_the_same_body_and_its_own_settings(job: Path) -> None:
    code, output = ended(start(job, "done", script="finetune", TEST="val", INIT_FROM="", DATA="labelled"))
    assert code == 0, output
    arguments = (job / "srun.called").read_text().splitlines()
    assert arguments[arguments.index("-m") + 1] == "beit_dist.finetune"
    assert arguments[-6:-3] == ["run=run", "data=labelled", "validation.data=val"], "no init_from, as it is empty"
    assert ended(start(job, "fails", script="finetune"))[0] == 3
    assert "init_from=runs/base" in (job / "srun.called").read_text().splitlines()


ARRAY = {
    "SLURM_ARRAY_JOB_ID": "41010",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "3",
    "PYTHON": "./python",
    "IMAGES": "photos and more",
    "DATA": "out/shards/",
}


def array_task(job: Path, behaviour: str = "done", **settings: str) -> subprocess.Popen[str]:
    """A task of an array, by default the last of four."""
    return start(job, behaviour, script="tokenize", arguments=["--views", "4"], **{**ARRAY, **settings})


def test_a_whole_array_gives_the_number_of_workers(job: Path) -> None:
    code, output = ended(array_task(job))
    assert code == 0, output
    workers, *arguments = (job / "python.called").read_text().splitlines()
    assert workers == "4"
    assert arguments[:7] == ["-m", "beit_dist", "shards", "--images", "photos and more", "--out", "out/shards/"]
    assert arguments[-4:] == ["--metrics-port", f"{10000 + 16 * 20 + 10}", "--views", "4"]


@pytest.mark.parametrize("part", [(3, 3), (0, 1), (2, 3)])
def test_parts_of_an_array_are_the_same_workers(job: Path, part: tuple[int, int]) -> None:
    first, last = part
    ids = {"SLURM_ARRAY_TASK_COUNT": str(last - first + 1), "SLURM_ARRAY_TASK_ID": str(last)}
    ids |= {"SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_MAX": str(last)}
    assert ended(array_task(job, BEIT_WORKERS="4", **ids))[0] == 0
    assert (job / "python.called").read_text().splitlines()[0] == "4"
    if first:
        (job / "python.called").unlink()
        code, output = ended(array_task(job, **ids))
        assert code == 2
        assert "BEIT_WORKERS is not set" in output
        assert not (job / "python.called").exists()


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGTERM])
def test_a_task_that_is_stopped_goes_back_alone_and_prometheus_forgets_it(job: Path, stop: signal.Signals) -> None:
    (job / "targets" / "tokenize").mkdir(parents=True)
    process = array_task(job, "waits", BEIT_TARGETS=str(job / "targets"), MASTER_ADDR="elsewhere")
    until_ready(job, process)
    (target,) = (job / "targets" / "tokenize").iterdir()
    labels = {"run": "shards", "slurm_job_id": "41010_3"}
    assert json.loads(target.read_text()) == [{"targets": [f"node7:{10000 + 16 * 20 + 10}"], "labels": labels}]
    process.send_signal(stop)
    code, output = ended(process)
    assert code == 0, output
    assert (job / "requeued").read_text() == "41010_3\n", "the number alone may be that of the whole array"
    assert not list((job / "targets" / "tokenize").iterdir())


def test_a_task_that_fails_or_is_stopped_too_often_fails(job: Path) -> None:
    code, output = ended(array_task(job, "fails"))
    assert code == 3
    assert "BEIT_WORKERS=4 sbatch --array=3" in output
    process = array_task(job, "waits", MAX_RESTARTS="1", SLURM_RESTART_COUNT="1")
    until_ready(job, process)
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 1, "the next step must not begin"
    assert not (job / "requeued").exists()


def test_a_worker_that_is_in_no_array_says_so(job: Path) -> None:
    code, output = ended(array_task(job, SLURM_ARRAY_TASK_ID=""))
    assert code == 2
    assert "no task of an array" in output


def test_one_command_runs_once_what_it_needs_is_there(job: Path) -> None:
    settings = {"PYTHON": "./python", "BEIT_NEEDS": "run/DONE"}
    code, output = ended(start(job, "done", script="beit", arguments=["export", "a run"], **settings))
    assert code == 1
    assert "run/DONE is not there" in output
    (job / "run" / "DONE").touch()
    assert ended(start(job, "done", script="beit", arguments=["export", "a run"], **settings))[0] == 0
    assert (job / "python.called").read_text().splitlines()[1:] == ["-m", "beit_dist", "export", "a run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_site_gives_settings_that_the_environment_does_not(job: Path, script: str) -> None:
    site = job / "site"
    shutil.copytree(FOLDER, site)
    (site / "site.sh").write_text("echo $UNSET_BY_ALL\nPYTHON=${PYTHON:-./python}\nMAX_RESTARTS=many\n")
    code, output = ended(start(job, "done", script=script, BEIT_SLURM=str(site), **{**ARRAY, "MAX_RESTARTS": "1"}))
    assert (code, "MAX_RESTARTS: got 'many'" in output) == (2, True), output
    (site / "site.sh").write_text("echo $UNSET_BY_ALL\nPYTHON=${PYTHON:-./python}\n")
    settings = {name: value for name, value in ARRAY.items() if name != "PYTHON"}
    code, output = ended(start(job, "done", script=script, BEIT_SLURM=str(site), **settings))
    assert code == 0, output
    if script in TRAININGS:
        assert "./python" in (job / "srun.called").read_text().splitlines()
    else:
        assert (job / "python.called").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_does_not_find_the_others_says_so(job: Path, script: str) -> None:
    code, output = ended(start(job, "done", script=script, without={"BEIT_SLURM"}))
    assert code == 2
    assert "submit from the checkout, or set BEIT_SLURM" in output


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("behaviour", ["done", "fails"])
def test_a_secret_of_the_environment_is_not_printed(job: Path, script: str, behaviour: str) -> None:
    _, output = ended(start(job, behaviour, script=script, AWS_SECRET_ACCESS_KEY="hunter2-of-tests", **ARRAY))
    assert "hunter2-of-tests" not in output
