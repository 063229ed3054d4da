"""The manifests of ``cluster/kubernetes`` as they are rendered: valid, and true to what the programs do."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor
from support.kustomize import KUBERNETES, Rendered, Resource, Workload, render

import beit_dist
from beit_dist.commands import shards
from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.run import LoggingConfig, RunConfig
from beit_dist.engine.resolve import read_ds_config, resolve

REPOSITORY = KUBERNETES.parents[1]
SCHEMAS = Path(__file__).parent / "schemas"
CUSTOM = {"JobSet": "jobset-v1alpha2.json", "PodMonitor": "podmonitor-v1.json"}
VERSIONS = sorted({major_minor(version) for version in all_versions()}, key=lambda v: [*map(int, v.split("."))])
VERSIONS = VERSIONS[VERSIONS.index("1.31") :]
TRAININGS = [
    "base",
    "finetune",
    *(f"overlays/{each.name}" for each in sorted((KUBERNETES / "overlays").iterdir())),
]
FOLDERS = [*TRAININGS, "tokenize", "with-monitoring"]


@pytest.fixture(scope="module")
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The resources of a folder; ``with-monitoring`` is what a user makes to have the component too."""
    if request.param != "with-monitoring":
        return render(request.param)
    folder = tmp_path_factory.mktemp("with-monitoring")
    place = os.path.relpath(KUBERNETES, folder.resolve())
    own = {"resources": [f"{place}/base", f"{place}/tokenize"], "components": [f"{place}/monitoring"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return render(folder)


everywhere = pytest.mark.parametrize("rendered", FOLDERS, indirect=True)
in_trainings = pytest.mark.parametrize("rendered", TRAININGS, indirect=True)


def validate(resource: Resource, version: str) -> None:
    """Refuse what Kubernetes, or the operator of a custom kind, would; or ignore, as it has no such field."""
    if resource["kind"] == "PrometheusRule":
        return  # promtool checks what is in it (test_monitoring.py)
    if resource["kind"] not in CUSTOM:
        kubernetes_validate.validate(resource, version, strict=True)
        return
    schema = json.loads((SCHEMAS / CUSTOM[resource["kind"]]).read_text())
    assert schema["$comment"].startswith(f"spec of {resource['kind']}, {resource['apiVersion']}.")
    jsonschema.Draft202012Validator(schema).validate(resource["spec"])
    for replicated in resource["spec"].get("replicatedJobs", ()):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@everywhere
def test_every_resource_is_valid_to_the_last_field(rendered: Rendered, version: str) -> None:
    assert rendered
    for resource in rendered:
        validate(resource, version)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Job", ("completion",), 2),
        ("JobSet", ("failurePolicy", "maxRestart"), 2),
        ("JobSet", ("failurePolicy", "maxRestarts"), "2"),
        ("JobSet", ("replicatedJobs", 0, "template", "spec", "template", "spec", "subdomains"), "x"),
        ("PodMonitor", ("podMetricsEndpoints", 0, "ports"), "x"),
        ("PodMonitor", ("podMetricsEndpoints", 0, "interval"), "15 seconds"),
    ],
)
def test_a_slip_in_a_field_is_found(kind: str, path: tuple[str | int, ...], value: object) -> None:
    folder = {"Job": "base/job.yaml", "PodMonitor": "monitoring/podmonitor.yaml"}.get(kind)
    resource = next(yaml.safe_load_all((KUBERNETES / folder).read_text())) if folder else None
    if resource is None:
        (resource,) = json.loads(json.dumps(render("overlays/jobset").of_kind("JobSet")))
    validate(resource, VERSIONS[-1])
    place: Any = resource["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(resource, VERSIONS[-1])


@everywhere
def test_images_have_the_tag_of_this_version(rendered: Rendered) -> None:
    for workload in rendered.workloads.values():
        kinds = ("-cpu",) if "nvidia.com/gpu" not in workload.container["resources"]["limits"] else ("",)
        kinds = ("", "-cpu") if workload.container["name"] == "worker" else kinds
        assert workload.container["image"] in [f"beit-dist:{beit_dist.__version__}{kind}" for kind in kinds]


@in_trainings
def test_nodes_and_gpus_are_the_same_number_everywhere(rendered: Rendered) -> None:
    job = rendered.training
    nodes, gpus = job.environment["NODES"], job.environment["GPUS_PER_NODE"]
    assert job.spec["completions"] == job.spec["parallelism"] == int(nodes)
    resources = job.container["resources"]
    assert resources["limits"].get("nvidia.com/gpu") == resources["requests"].get("nvidia.com/gpu")
    assert resources["limits"].get("nvidia.com/gpu", gpus) == gpus
    assert job.spec["backoffLimit"] % int(nodes) == 0, "whole restarts of the run"
    assert job.spec["backoffLimit"] >= 5 * int(nodes) or rendered.of_kind("JobSet"), "the operator counts restarts"


def test_the_number_of_nodes_is_set_in_one_place(tmp_path: Path) -> None:
    found = _with(tmp_path, "base", "counts", "Job", "beit-pretrain", {"completions": 32}).training
    assert (found.spec["parallelism"], found.environment["NODES"]) == (32, "32")


@pytest.mark.parametrize("base", ["base", "finetune", "overlays/many-nodes"])
def test_a_second_run_in_a_namespace_finds_its_own_rank_0(tmp_path: Path, base: str) -> None:
    name = render(base).training.name
    found = _with(tmp_path, base, "counts", "Job", name, {"completions": 3}, nameSuffix="-b")
    job = found.training
    assert job.name == job.service == f"{name}-b"
    assert job.environment["MASTER_ADDR"] == job.host_name(0)
    (service,) = found.of_kind("Service")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": f"{name}-b"}


def test_the_number_of_workers_is_set_in_one_place(tmp_path: Path) -> None:
    found = _with(tmp_path, "tokenize", "tokenize/workers", "Job", "beit-tokenize-work", {"completions": 3})
    work = found.workloads["beit-tokenize-work"]
    assert work.spec["parallelism"] == 3
    assert {each.environment["BEIT_WORKERS"] for each in found.workloads.values()} == {"3"}


def test_the_kustomization_in_the_docs_sets_what_it_says(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "clusters.md").read_text()
    (example,) = re.findall(r"```yaml\n(# mine/kustomization\.yaml.*?)```", text, re.DOTALL)
    place = os.path.relpath(KUBERNETES, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(example.replace("../cluster/kubernetes", place))
    (tmp_path / "recipe.yaml").write_text((REPOSITORY / "configs" / "beit_large.yaml").read_text())
    found = render(tmp_path)
    job = found.training
    assert job.spec["completions"] == job.spec["parallelism"] == int(job.environment["NODES"]) == 32
    assert job.spec["backoffLimit"] == 320
    assert recipe_of(found, tmp_path / "unpacked").run == "/runs/mine"
    assert job.container["image"].endswith(f"/beit-dist:{beit_dist.__version__}")
    assert found.of_kind("PodMonitor")


def _with(folder: Path, base: str, counts: str, kind: str, name: str, spec: Resource, **others: str) -> Rendered:
    """A user's kustomization that changes one specification."""
    place = os.path.relpath(KUBERNETES, folder.resolve())
    patch = {"apiVersion": "batch/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    own = {
        "resources": [f"{place}/{base}"],
        "patches": [{"patch": yaml.safe_dump(patch)}],
        "transformers": [f"{place}/{counts}"],
        **others,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return render(folder)


def recipe_of(rendered: Rendered, folder: Path) -> RunConfig:
    """What the trainer makes of the config map, the arguments and the variables."""
    job = rendered.training
    files = rendered.config_map("beit-configs")
    (named,) = [word.partition("=")[2] for word in job.arguments if word.startswith("--config=")]
    assert os.path.dirname(named) == _mounted(rendered, job)["beit-configs"]
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(files[os.path.basename(named)])
    kinds = {"beit_dist.train": PretrainingConfig, "beit_dist.finetune": FinetuningConfig}
    kind: type[RunConfig] = kinds[job.environment["MODULE"]]
    return load_recipe(kind, folder / "recipe.yaml", job.overrides)


def _mounted(rendered: Rendered, job: Workload) -> dict[str, str]:
    """Where each config map lies in the pod; its name without the hash."""
    volumes = {each["name"]: each["configMap"]["name"] for each in job.pod["volumes"] if "configMap" in each}
    assert set(volumes.values()) <= set(rendered.config_maps)
    mounts = {mount["name"]: mount["mountPath"] for mount in job.container["volumeMounts"]}
    return {name.rpartition("-")[0]: mounts[volume] for volume, name in volumes.items()}


@in_trainings
def test_recipe_and_deepspeed_file_load_and_the_batch_divides(rendered: Rendered, tmp_path: Path) -> None:
    job = rendered.training
    recipe = recipe_of(rendered, tmp_path)
    ranks = int(job.environment["NODES"]) * int(job.environment["GPUS_PER_NODE"])
    assert recipe.run == job.environment["RUN"], "the entry script looks for the markers there"
    assert recipe.data == job.environment["DATA"]
    (named,) = [word.partition("=")[2] for word in job.arguments if word.startswith("--ds_config=")]
    (tmp_path / "ds.json").write_text(rendered.config_map("beit-configs")[os.path.basename(named)])
    resolved = resolve(recipe, read_ds_config(tmp_path / "ds.json"), ranks)  # refuses a batch that does not
    assert resolved.rank_batch * ranks == recipe.global_batch


@in_trainings
def test_config_maps_hold_the_files_of_the_repository(rendered: Rendered) -> None:
    for name, text in rendered.config_map("beit-configs").items():
        folder = REPOSITORY / "configs" / ("deepspeed" if name.endswith(".json") else "")
        assert text == (folder / name).read_text()
    for name, text in rendered.config_map("beit-entry").items():
        assert text == (KUBERNETES / "base" / name).read_text()
    command = rendered.training.container["command"]
    assert os.path.basename(command[1]) in rendered.config_map("beit-entry")
    assert os.path.dirname(command[1]) == _mounted(rendered, rendered.training)["beit-entry"]


@in_trainings
def test_every_variable_of_the_entry_script_is_set(rendered: Rendered) -> None:
    text = rendered.config_map("beit-entry")["entry.sh"]
    read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", text)) | set(
        re.findall(r"\(\(([A-Z_]+) \* ([A-Z_]+)\)", text)[0]
    )
    with_default = set(re.findall(r"\$\{([A-Z_]+):-", text))
    set_by_itself = set(re.findall(r"export ([A-Z_]+)=", text))
    by_kubernetes = {"JOB_COMPLETION_INDEX"} if rendered.training.spec["completionMode"] == "Indexed" else set()
    assert {"NODES", "GPUS_PER_NODE", "RUN"} <= read
    assert read - with_default - set_by_itself - by_kubernetes <= set(rendered.training.environment)


@everywhere
def test_every_variable_in_arguments_is_set(rendered: Rendered) -> None:
    for job in rendered.workloads.values():
        assert not [word for word in job.arguments if "$(" in word]


@in_trainings
def test_a_save_fits_into_the_shutdown_and_that_into_the_grace_period(rendered: Rendered, tmp_path: Path) -> None:
    job = rendered.training
    shutdown = int(job.environment["SHUTDOWN_SECONDS"])
    grace = job.pod["terminationGracePeriodSeconds"]
    assert recipe_of(rendered, tmp_path).checkpoint.timeout_seconds < shutdown < grace


@in_trainings
def test_the_service_finds_the_pods_and_names_rank_0(rendered: Rendered) -> None:
    job = rendered.training
    assert job.service is not None
    assert job.environment["MASTER_ADDR"] == job.host_name(0)
    for jobset in rendered.of_kind("JobSet"):
        network = jobset["spec"]["network"]
        assert network["enableDNSHostnames"] is network["publishNotReadyAddresses"] is True
        assert not rendered.of_kind("Service"), "the operator makes it"
    for service in rendered.of_kind("Service"):
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        assert service["spec"]["selector"].items() <= job.labels.items()


@in_trainings
def test_pods_are_kept_apart_by_their_own_labels(rendered: Rendered) -> None:
    job = rendered.training
    terms = job.pod.get("affinity", {}).get("podAntiAffinity", {})
    for term in terms.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
        assert term["labelSelector"]["matchLabels"].items() <= job.labels.items()


@in_trainings
def test_ports_are_those_of_the_trainer(rendered: Rendered, tmp_path: Path) -> None:
    job = rendered.training
    ports = {port["name"]: port["containerPort"] for port in job.container["ports"]}
    for service in rendered.of_kind("Service"):
        assert ports == {port["name"]: port["port"] for port in service["spec"]["ports"]}
    logging = recipe_of(rendered, tmp_path).logging
    assert ports["metrics"] == logging.metrics_port == LoggingConfig().metrics_port
    assert logging.metrics_address == "0.0.0.0"
    assert ports["rendezvous"] == int(job.environment["MASTER_PORT"])
    probe = job.container["readinessProbe"]["exec"]["command"]
    assert probe == ["bash", f"{_mounted(rendered, job)['beit-entry']}/healthy.sh", str(ports["metrics"])]
    assert "healthy.sh" in rendered.config_map("beit-entry")


@everywhere
def test_wrong_input_ends_a_job_and_a_drained_node_does_not_count(rendered: Rendered) -> None:
    for job in rendered.workloads.values():
        wrong, *stopped, drained = job.spec["podFailurePolicy"]["rules"]
        assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [2])
        assert (drained["action"], drained["onPodConditions"]) == (
            "Ignore",
            [{"type": "DisruptionTarget", "status": "True"}],
        )
        if job.container["name"] == "trainer":
            assert [(rule["action"], rule["onExitCodes"]["values"]) for rule in stopped] == [("Ignore", [75])]
        for rule in (wrong, *stopped):
            assert rule["onExitCodes"]["containerName"] == job.container["name"]


@everywhere
def test_nothing_runs_as_root_or_writes_to_the_image(rendered: Rendered) -> None:
    for job in rendered.workloads.values():
        pod, container = job.pod, job.container
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "a Service named master would set MASTER_PORT"
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(volumes) == set(mounts.values())
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        scratch = job.environment["HOME"]
        assert "emptyDir" in volumes[mounts[scratch]]
        assert "emptyDir" in volumes[mounts["/tmp"]]
        caches = [
            value for name, value in job.environment.items() if name.endswith(("_CACHE_DIR", "_EXTENSIONS_DIR"))
        ]
        assert "TORCHINDUCTOR_CACHE_DIR" in job.environment
        assert all(cache.startswith(f"{scratch}/") for cache in caches)


@everywhere
def test_secrets_come_by_reference(rendered: Rendered) -> None:
    assert not rendered.of_kind("Secret")
    for job in rendered.workloads.values():
        assert job.container["envFrom"] == [{"secretRef": {"name": "beit-storage", "optional": True}}]
        assert not [name for name in job.environment if re.search("KEY|SECRET|PASSWORD|CREDENTIAL", name)]


def test_the_three_steps_of_tokenising_have_the_same_pod_and_arguments_that_their_command_knows() -> None:
    found = render("tokenize").workloads
    work = found["beit-tokenize-work"]
    assert [*found] == [f"beit-tokenize-{step}" for step in ("finish", "freeze", "work")]
    for job in found.values():
        assert job.pod["volumes"] == work.pod["volumes"]
        assert job.pod["securityContext"] == work.pod["securityContext"]
        for field in ("command", "image", "env", "envFrom", "volumeMounts", "securityContext"):
            assert job.container[field] == work.container[field]
        assert job.container["command"] == ["python", "-m", "beit_dist", "shards"]
        shards.parser().parse(job.arguments)
    assert work.spec["completionMode"] == "Indexed"
    assert work.spec["completions"] == work.spec["parallelism"] == int(work.environment["BEIT_WORKERS"])
    assert work.spec["backoffLimitPerIndex"] > 0
    assert work.environment["DECODERS"] == work.container["resources"]["requests"]["cpu"]
    assert work.pod["shareProcessNamespace"] is True, "Python as process 1 would not end at SIGTERM"


def test_the_metrics_of_a_worker_are_where_its_probes_and_the_monitor_look() -> None:
    work = render("tokenize").workloads["beit-tokenize-work"]
    arguments = shards.parser().parse(work.arguments)
    (port,) = work.container["ports"]
    assert (port["name"], port["containerPort"]) == ("metrics", arguments.metrics_port)
    assert arguments.metrics_address == "0.0.0.0"
    assert work.container["startupProbe"]["tcpSocket"]["port"] == "metrics"
    assert work.container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}


@pytest.mark.parametrize("rendered", ["with-monitoring"], indirect=True)
def test_the_monitors_take_the_pods_that_serve_metrics_and_no_others(rendered: Rendered) -> None:
    jobs = {**rendered.workloads, **render("finetune").workloads}
    taken = []
    for monitor in rendered.of_kind("PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        for job in jobs.values():
            if endpoint["port"] not in [port["name"] for port in job.container.get("ports", ())]:
                continue
            for number in range(job.spec["completions"]):
                labels = {**job.labels, "batch.kubernetes.io/job-completion-index": str(number)}
                if _chosen(labels, monitor["spec"]["selector"]):
                    taken.append((monitor["metadata"]["name"], job.name, number))
    workers = [("beit-tokenize", "beit-tokenize-work", number) for number in range(16)]
    assert sorted(taken) == sorted([("beit", "beit-pretrain", 0), ("beit", "beit-finetune", 0), *workers])


def _chosen(labels: dict[str, str], selector: Resource) -> bool:
    """Whether a label selector takes what has these labels."""
    for wanted in selector.get("matchExpressions", ()):
        assert wanted["operator"] == "NotIn"
        if labels.get(wanted["key"]) in wanted["values"]:
            return False
    return bool(selector["matchLabels"].items() <= labels.items())


# kubectl: notes what it is told; the Job whose step is $FAILS fails, others are complete when asked again.
KUBECTL = """#!/usr/bin/env bash
echo "$*" >> calls
[[ $1 == get ]] || exit 0
echo asked >> "$3"
[[ $(wc -l < "$3") -gt 1 ]] || exit 0
if [[ $3 == *"$FAILS" ]]; then echo -n "FailureTarget Failed"; else echo -n "SuccessCriteriaMet Complete"; fi
"""


@pytest.mark.parametrize(("fails", "code", "last"), [("none", 0, "finish"), ("work", 1, "work")])
def test_tokenising_goes_step_by_step_and_stops_at_one_that_failed(
    tmp_path: Path, fails: str, code: int, last: str
) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POLL_SECONDS": "0.01", "FAILS": fails}
    command = ["bash", str(KUBERNETES / "tokenize" / "run.sh"), "mine"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=variables, timeout=60, check=False, capture_output=True, text=True
    )
    assert ended.returncode == code
    assert ("error: beit-tokenize-work failed." in ended.stderr) == bool(code)
    applied = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("apply")]
    steps = ["freeze", "work", "finish"]
    assert applied == [f"apply -k mine -l beit-dist/step={step}" for step in steps[: steps.index(last) + 1]]
    for step, job in zip(steps, ("freeze", "work", "finish"), strict=True):
        found = render("tokenize").of_kind("Job")
        (each,) = [one for one in found if one["metadata"]["labels"]["beit-dist/step"] == step]
        assert each["metadata"]["name"] == f"beit-tokenize-{job}"
