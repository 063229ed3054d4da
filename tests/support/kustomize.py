"""Manifests as ``kubectl kustomize`` renders them, and what is read from them again and again."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from support.programs import program

KUBERNETES = Path(__file__).resolve().parents[2] / "cluster" / "kubernetes"
Resource = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A Job, or the one Job that a JobSet makes."""

    name: str
    """Of the Job, which its pods' names begin with."""
    service: str | None
    """The headless Service under which its pods have names; None: they have none."""
    spec: Resource
    """Of the Job."""

    @property
    def pod(self) -> Resource:
        """Specification of its pods."""
        return dict(self.spec["template"]["spec"])

    @property
    def labels(self) -> dict[str, str]:
        """Of its pods, with what the Job's controller adds."""
        return {**self.spec["template"]["metadata"]["labels"], "batch.kubernetes.io/job-name": self.name}

    @property
    def container(self) -> Resource:
        """The only one of a pod."""
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the manifest gives the container."""
        return {entry["name"]: entry["value"] for entry in self.container["env"]}

    @property
    def arguments(self) -> list[str]:
        """The container's, with the variables filled in."""
        return [expanded(word, self.environment) for word in self.container["args"]]

    @property
    def overrides(self) -> list[str]:
        """The recipe's overrides among the arguments."""
        return [word for word in self.arguments if not word.startswith("--")]

    def host_name(self, index: int) -> str:
        """The name of a pod that others can look up."""
        return f"{self.name}-{index}.{self.service}"


class Rendered(list[Resource]):
    """The resources of one folder."""

    def of_kind(self, kind: str) -> list[Resource]:
        """All of a kind."""
        return [resource for resource in self if resource["kind"] == kind]

    @property
    def config_maps(self) -> dict[str, dict[str, str]]:
        """The files of each config map, by its full name."""
        return {each["metadata"]["name"]: each["data"] for each in self.of_kind("ConfigMap")}

    def config_map(self, name: str) -> dict[str, str]:
        """The files of one whose name is given without the hash that kustomize adds."""
        (found,) = [files for full, files in self.config_maps.items() if full.rpartition("-")[0] == name]
        return found

    @property
    def workloads(self) -> dict[str, Workload]:
        """All Jobs by name, JobSets' included."""
        found = []
        for job in self.of_kind("Job"):
            names = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
            services = [
                each for each in self.of_kind("Service") if each["spec"]["selector"].items() <= names.items()
            ]
            subdomain = job["spec"]["template"]["spec"].get("subdomain")
            service = next((s["metadata"]["name"] for s in services if s["metadata"]["name"] == subdomain), None)
            found.append(Workload(job["metadata"]["name"], service, job["spec"]))
        for jobset in self.of_kind("JobSet"):
            (replicated,) = jobset["spec"]["replicatedJobs"]
            name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
            found.append(Workload(name, jobset["spec"]["network"]["subdomain"], replicated["template"]["spec"]))
        return {each.name: each for each in found}

    @property
    def training(self) -> Workload:
        """The one with the container ``trainer``."""
        (found,) = [each for each in self.workloads.values() if each.container["name"] == "trainer"]
        return found


def expanded(word: str, variables: dict[str, str]) -> str:
    """``$(NAME)`` filled in, as Kubernetes does it; what it does not know it leaves as it is."""
    for name, value in variables.items():
        word = word.replace(f"$({name})", value)
    return word


@cache
def render(folder: str | Path) -> Rendered:
    """What ``kubectl apply -k`` would send; a relative ``folder`` is one of cluster/kubernetes."""
    command = [program("kubectl"), "kustomize", str(KUBERNETES / folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=False)
    if text.returncode:
        raise AssertionError(text.stderr)
    return Rendered(yaml.safe_load_all(text.stdout))
