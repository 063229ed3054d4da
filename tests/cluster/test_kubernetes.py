"""The manifests of ``cluster/kubernetes/base``: valid, and true to what the trainer does."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.programs import program

import beit_dist
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.run import LoggingConfig

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "cluster" / "kubernetes" / "base"
ENTRY = BASE / "entry.sh"


def manifest(name: str) -> dict[str, Any]:
    """One of the files as it lies in the folder."""
    return dict(yaml.safe_load((BASE / name).read_text()))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return dict(manifest("job.yaml")["spec"])


@pytest.fixture(scope="module")
def pod(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["template"]["spec"])


@pytest.fixture(scope="module")
def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return dict(container)


def environment(trainer: dict[str, Any]) -> dict[str, str]:
    """The container's variables."""
    return {entry["name"]: entry["value"] for entry in trainer["env"]}


def overrides(trainer: dict[str, Any]) -> list[str]:
    """The recipe's overrides among the container's arguments."""
    return [argument for argument in trainer["args"] if not argument.startswith("--")]


@pytest.mark.parametrize("name", ["job.yaml", "service.yaml"])
def test_a_manifest_is_valid_to_the_last_field(name: str) -> None:
    kubernetes_validate.validate(manifest(name), "1.34", strict=True)


def test_the_folder_renders_with_the_configs_and_a_pinned_image() -> None:
    rendered = subprocess.run(
        [program("kubectl"), "kustomize", str(BASE)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for resource in yaml.safe_load_all(rendered):
        kubernetes_validate.validate(resource, "1.34", strict=True)
        generated = resource["kind"] == "ConfigMap"  # its name ends in a hash of its content
        found[resource["metadata"]["name"].rsplit("-", 1)[0] if generated else resource["kind"]] = resource
    configs = found["beit-configs"]["data"]
    assert configs["beit_base.yaml"] == (REPOSITORY / "configs" / "beit_base.yaml").read_text()
    assert configs["zero1.json"] == (REPOSITORY / "configs" / "deepspeed" / "zero1.json").read_text()
    assert found["beit-entry"]["data"]["entry.sh"] == ENTRY.read_text()
    spec = found["Job"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == f"beit-dist:{beit_dist.__version__}"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["configs"]["configMap"]["name"] == found["beit-configs"]["metadata"]["name"]


def test_the_image_has_the_tag_of_this_version() -> None:
    (image,) = manifest("kustomization.yaml")["images"]
    assert image["newTag"] == beit_dist.__version__


def test_nodes_and_gpus_are_the_same_number_everywhere(job: dict[str, Any], trainer: dict[str, Any]) -> None:
    nodes, gpus = environment(trainer)["NODES"], environment(trainer)["GPUS_PER_NODE"]
    assert job["completions"] == job["parallelism"] == int(nodes)
    resources = trainer["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == gpus
    assert job["backoffLimit"] % int(nodes) == 0, "whole restarts of the run"


def test_the_recipe_in_the_job_loads_and_its_batch_divides(trainer: dict[str, Any]) -> None:
    recipe = load_recipe(PretrainingConfig, REPOSITORY / "configs" / "beit_base.yaml", overrides(trainer))
    ranks = int(environment(trainer)["NODES"]) * int(environment(trainer)["GPUS_PER_NODE"])
    assert recipe.global_batch % ranks == 0
    assert recipe.run == environment(trainer)["RUN"], "the entry script looks for the markers there"


def test_a_save_fits_into_the_shutdown_and_that_into_the_grace_period(
    pod: dict[str, Any], trainer: dict[str, Any]
) -> None:
    recipe = load_recipe(PretrainingConfig, None, overrides(trainer))
    shutdown = int(environment(trainer)["SHUTDOWN_SECONDS"])
    assert recipe.checkpoint.timeout_seconds < shutdown < pod["terminationGracePeriodSeconds"]


def test_the_service_finds_the_pods_and_names_rank_0(
    job: dict[str, Any], pod: dict[str, Any], trainer: dict[str, Any]
) -> None:
    service = manifest("service.yaml")
    name = manifest("job.yaml")["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment(trainer)["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"


def test_ports_are_those_of_the_trainer(trainer: dict[str, Any]) -> None:
    ports = {port["name"]: port["containerPort"] for port in trainer["ports"]}
    assert ports == {port["name"]: port["port"] for port in manifest("service.yaml")["spec"]["ports"]}
    assert ports["metrics"] == LoggingConfig().metrics_port
    assert load_recipe(PretrainingConfig, None, overrides(trainer)).logging.metrics_address == "0.0.0.0"
    assert ports["rendezvous"] == int(environment(trainer)["MASTER_PORT"])


def test_wrong_input_ends_the_job_and_a_stop_or_a_drained_node_does_not_count(job: dict[str, Any]) -> None:
    wrong, stopped, drained = job["podFailurePolicy"]["rules"]
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [75])
    assert drained["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_nothing_runs_as_root_or_writes_to_the_image(pod: dict[str, Any], trainer: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "a Service named master would set MASTER_PORT"
    assert trainer["securityContext"]["readOnlyRootFilesystem"] is True
    assert trainer["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"] for mount in trainer["volumeMounts"]}
    assert {"/dev/shm", "/tmp", environment(trainer)["HOME"]} <= mounts
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in trainer["volumeMounts"]}


# python: the dry run gives $DRY_RUN; the launcher notes its arguments and ends as $BEHAVIOUR says.
PYTHON = """#!/usr/bin/env bash
if [[ " $* " == *" --dry-run "* ]]; then echo "$*" > dry-run.called; exit "${DRY_RUN:-0}"; fi
printf '%s\\n' "$@" > launcher.called
case $BEHAVIOUR in
  done) touch run/DONE ;;
  done-later) (sleep 0.5; touch run/DONE) >/dev/null 2>&1 & ;;
  stopped) touch run/PREEMPTED; exit 1 ;;
  stopped-cleanly) touch run/PREEMPTED ;;
  wrong) printf '{\\n "rank": 3,\\n "exit_code": 2,\\n "error": ""\\n}' > run/FAILED; exit 1 ;;
  crashes) printf '{\\n "rank": 3,\\n "exit_code": 1,\\n "error": ""\\n}' > run/FAILED; exit 1 ;;
  dies) exit 1 ;;
  refused) touch "$BEIT_DIST_REFUSED"; exit 1 ;;
  waits)
    trap 'touch run/PREEMPTED; exit 1' TERM
    touch ready
    for _ in $(seq 600); do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def entry(tmp_path: Path, trainer: dict[str, Any]) -> tuple[Path, dict[str, str]]:
    """A folder with stand-ins for ``python`` and ``getent``, and the pod's variables for it."""
    (tmp_path / "run").mkdir()
    for name, text in (("python", PYTHON), ("getent", "#!/bin/sh\nexit 0\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "RUN": "run",
        "JOB_COMPLETION_INDEX": "0",
        "MARKER_SECONDS": "3",
        "TMPDIR": str(tmp_path),
    }
    return tmp_path, environment(trainer) | settings


def run_entry(entry: tuple[Path, dict[str, str]], behaviour: str, **settings: str) -> int:
    """The exit code that the Job sees."""
    folder, variables = entry
    variables = variables | {"BEHAVIOUR": behaviour} | settings
    command = ["bash", str(ENTRY), "--config=r.yaml", "run=run"]
    return subprocess.run(command, cwd=folder, env=variables, timeout=60, check=False).returncode


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("done", 0),
        ("done-later", 0),
        ("stopped", 75),
        ("stopped-cleanly", 75),  # with 0 the Job would never start this index again
        ("wrong", 2),
        ("refused", 2),
        ("crashes", 1),
        ("dies", 1),
        ("nothing", 1),
    ],
)
def test_the_exit_code_tells_how_the_run_ended(
    entry: tuple[Path, dict[str, str]], behaviour: str, code: int
) -> None:
    assert run_entry(entry, behaviour) == code


@pytest.mark.parametrize("marker", ["DONE", "PREEMPTED", "FAILED"])
def test_a_marker_of_the_last_start_does_not_hide_a_crash(entry: tuple[Path, dict[str, str]], marker: str) -> None:
    (entry[0] / "run" / marker).write_text(json.dumps({"exit_code": 2}))
    assert run_entry(entry, "dies") == 1


def test_a_refused_start_does_not_hide_how_the_next_one_ends(entry: tuple[Path, dict[str, str]]) -> None:
    assert run_entry(entry, "refused") == 2
    assert run_entry(entry, "dies") == 1


def test_wrong_settings_end_the_pod_before_the_launcher_starts(entry: tuple[Path, dict[str, str]]) -> None:
    assert run_entry(entry, "done", DRY_RUN="2") == 2
    assert not (entry[0] / "launcher.called").exists()
    assert "--ranks 16" in (entry[0] / "dry-run.called").read_text()


def test_each_pod_starts_its_ranks_under_its_own_index(entry: tuple[Path, dict[str, str]]) -> None:
    assert run_entry(entry, "done", JOB_COMPLETION_INDEX="1") == 0
    arguments = (entry[0] / "launcher.called").read_text().splitlines()
    given = dict(itertools.pairwise(arguments))
    assert given["--node-rank"] == "1"
    assert given["--nnodes"] == "2"
    assert given["--nproc-per-node"] == "8"
    assert given["--master-addr"] == "beit-pretrain-0.beit-pretrain"
    assert arguments[-4:] == ["-m", "beit_dist.train", "--config=r.yaml", "run=run"]


def test_torchrun_knows_the_options_that_the_entry_gives_it() -> None:
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    text = ENTRY.read_text()
    launcher = text[text.index("torch.distributed.run") : text.index('-m beit_dist.train "$@" &')]
    assert {word for word in launcher.split() if word.startswith("--")} <= known


def test_the_pods_stop_signal_reaches_the_ranks(entry: tuple[Path, dict[str, str]]) -> None:
    folder, variables = entry
    process = subprocess.Popen(["bash", str(ENTRY)], cwd=folder, env=variables | {"BEHAVIOUR": "waits"})
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 75
