"""What stands in ``cluster/monitoring``: rules that promtool accepts, and a dashboard that real data fills."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.ports import free_ports
from support.prometheus import installed, running
from support.runs import Run, wait

from beit_dist.commands import inspect
from beit_dist.config.run import LoggingConfig
from beit_dist.engine.metrics import Metric
from beit_dist.engine.metrics import Metrics as TrainingMetrics
from beit_dist.tokenizing.metrics import METRICS as TOKENISING
from beit_dist.tokenizing.metrics import STALL_SECONDS, Exporter, Metrics

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
PROMETHEUS = MONITORING / "prometheus"
DASHBOARD = json.loads((MONITORING / "grafana" / "beit.json").read_text())
RULES = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for group in RULES for rule in group["rules"]}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
NAMES = re.compile(r"(?<![\w:])beit[_:](?!dist\b)[\w:]+")

AlertRule = dict[str, Any]


@pytest.fixture
def promtool() -> Callable[..., str]:
    """``promtool(*arguments)``: what it says; it must be satisfied."""
    program = installed("promtool")

    def call(*arguments: str, text: str | None = None) -> str:
        command = [program, *arguments]
        done = subprocess.run(command, cwd=PROMETHEUS, input=text, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def trained() -> tuple[Metric, ...]:
    """What any kind of training exports."""
    return _tables()


def _tables() -> tuple[Metric, ...]:
    import doc_tables

    kinds = {task.kind for task in doc_tables.tasks()}
    own = (metric for kind in sorted(kinds) for metric in doc_tables.metrics_of(kind))
    found = {metric.name: metric for metric in (*doc_tables.METRICS, *own)}
    return tuple(found.values())


def _exported(metrics: tuple[Metric, ...]) -> set[str]:
    """The names of their series."""
    endings = {"counter": ["_total"], "info": ["_info"], "gauge": [""]}
    endings["histogram"] = ["_sum", "_count", "_bucket"]
    return {metric.name + ending for metric in metrics for ending in endings[metric.kind]}


# ---------------------------------------------------------------------------------------------------------- rules


@pytest.mark.server
def test_promtool_accepts_the_configuration_and_the_rules(promtool: Callable[..., str]) -> None:
    promtool("check", "config", "prometheus.yaml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", "alerts.yaml")


@pytest.mark.server
def test_each_alert_fires_when_it_should_and_only_then(promtool: Callable[..., str]) -> None:
    assert "SUCCESS" in promtool("test", "rules", "tests.yaml")


def test_each_alert_has_a_test_in_which_it_fires() -> None:
    cases = yaml.safe_load((PROMETHEUS / "tests.yaml").read_text())["tests"]
    fired = re.findall(r'alertname="(\w+)"', str([case["promql_expr_test"] for case in cases]))
    assert set(fired) == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_each_alert_says_what_is_wrong_what_to_do_and_where_to_read_on(alert: AlertRule) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    said = alert["annotations"]
    assert "{{ $labels." in said["summary"], "it must name the run, or the worker"
    assert len(said["description"].split()) > 15
    page, anchor = said["runbook_url"].split("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert alert["alert"] in headings
    assert anchor == alert["alert"].lower()


def test_rules_dashboard_and_pages_name_only_what_is_exported(trained: tuple[Metric, ...]) -> None:
    known = _exported(trained) | _exported(TOKENISING) | set(RECORDED)
    pages = {
        "rules.yaml": " ".join(RECORDED.values()),
        "alerts.yaml": (PROMETHEUS / "alerts.yaml").read_text(),
        "beit.json": " ".join(expr for _, expr in QUERIES) + json.dumps(DASHBOARD["templating"]),
    }
    for page, text in pages.items():
        named = set(NAMES.findall(text))
        assert named
        assert named <= known, f"{page} names {sorted(named - known)}"
    bases = {metric.name for metric in (*trained, *TOKENISING)}
    for name in ("operations.md", "metrics.md", "data.md"):
        named = set(re.findall(r"\bbeit_(?!dist\b|base|large|tiny)\w+", (ROOT / "docs" / name).read_text()))
        assert named <= known | bases, f"docs/{name} names {sorted(named - known - bases)}"


def test_every_metric_stands_in_the_table(trained: tuple[Metric, ...]) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    endings = {"counter": "_total", "info": "_info"}
    names = [metric.name + endings.get(metric.kind, "") for metric in (*trained, *TOKENISING)]
    missing = [name for name in names if f"\n| `{name}` |" not in page]
    assert not missing, f"run tools/doc_tables.py: {missing}"


def test_every_recorded_series_is_used() -> None:
    used = " ".join([*(expr for _, expr in QUERIES), *(alert["expr"] for alert in ALERTS)])
    assert not [name for name in RECORDED if name not in used]


def test_the_alert_and_the_health_of_a_worker_have_one_limit() -> None:
    (alert,) = (alert for alert in ALERTS if alert["alert"] == "BeitTokenizeStalled")
    assert f"> {STALL_SECONDS:.0f}" in alert["expr"]


# ----------------------------------------------------------------------------------------------------- kubernetes


def test_the_pod_monitors_choose_the_pods_that_serve_metrics() -> None:
    kubernetes = ROOT / "cluster" / "kubernetes"
    training, workers = yaml.safe_load_all((kubernetes / "monitoring" / "podmonitor.yaml").read_text())
    job = yaml.safe_load((kubernetes / "base" / "job.yaml").read_text())
    pod = job["spec"]["template"]
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    chosen = dict(training["spec"]["selector"]["matchLabels"])
    index = chosen.pop("batch.kubernetes.io/job-completion-index")
    address = next(one["value"] for one in pod["spec"]["containers"][0]["env"] if one["name"] == "MASTER_ADDR")
    assert address.startswith(f"{job['metadata']['name']}-{index}."), "rank 0, which serves them, is in that pod"
    assert chosen.items() <= pod["metadata"]["labels"].items()
    (other,) = training["spec"]["selector"]["matchExpressions"]
    assert pod["metadata"]["labels"][other["key"]] not in other["values"]
    assert workers["spec"]["selector"]["matchLabels"][other["key"]] in other["values"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"]
    for monitor, config in zip((training, workers), scraped, strict=True):
        assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in ports
        labels = {one["targetLabel"]: one for one in endpoint["relabelings"]}
        assert labels["job"]["replacement"] == config["job_name"]
        assert "run" in labels


@pytest.mark.server
def test_one_command_takes_all_of_it_to_kubernetes() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is missing: https://kubernetes.io/docs/tasks/tools")
    command = [kubectl, "kustomize", str(MONITORING)]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(rendered)}
    assert {kind for kind, _ in found} == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    rules = [rule for group in found["PrometheusRule", "beit"]["spec"]["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in rules if "alert" in rule] == [alert["alert"] for alert in ALERTS]
    held = found["ConfigMap", "beit-dashboard"]
    assert held["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(held["data"]["beit.json"]) == DASHBOARD


# ------------------------------------------------------------------------------------------------------ dashboard


def test_the_dashboard_and_the_rules_of_the_operator_are_up_to_date(
    load_tool: Callable[[str], ModuleType],
) -> None:
    assert load_tool("make_monitoring").main(["--check"]) == 0, "run tools/make_monitoring.py"


def test_no_two_panels_have_the_same_number_or_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in PANELS for target in panel["targets"])


def _work(metrics: Metrics) -> None:
    """What a worker of the array does in a moment, some of it badly."""
    metrics.images(8)
    metrics.rejected("not_an_image")
    metrics.spent("encode", 0.1)
    metrics.retried({"throttled": 1})


@pytest.mark.server
@pytest.mark.slow
def test_every_query_of_the_dashboard_returns_data_of_a_real_run(
    new_run: Callable[..., Run],
    make_shards: Callable[..., Any],
    promtool: Callable[..., str],
    load_tool: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, held_out, (port,) = tmp_path / "prometheus", tmp_path / "held-out", free_ports(1)
    for data, sizes in ((tmp_path / "shards", [50, 64]), (held_out, [8])):
        make_shards(data, sizes, views=2, seed=len(sizes))
        assert inspect.main([str(data)]) == 0  # counts tokens: baselines rest on that
    places = [f"data={tmp_path / 'shards'}", f"validation.data={held_out}", f"logging.metrics_port={port}"]
    run = new_run("tiny", overrides=[*places, "validation.every_steps=5", "epochs=4000"])
    metrics = Metrics(0)
    metrics.plan(images=100_000, shards=2, images_done=0, shards_done=0)
    left = {query.replace("$run", "tiny").replace("$__rate_interval", "20s"): title for title, query in QUERIES}
    with Exporter(metrics, 0, None) as exporter, _cached_reads() as cached, running(folder) as prometheus:
        assert exporter.port is not None
        for job, served in (("train", port), ("tokenize", exporter.port), ("train", cached)):
            prometheus.target(job, "tiny", served)
        training = run.start()
        try:
            deadline = time.monotonic() + 60
            while left and time.monotonic() < deadline and training.poll() is None:
                _work(metrics)
                left = {
                    query: title
                    for query, title in left.items()
                    if not prometheus.asked("query", query=query)["result"]
                }
                time.sleep(0.3)
            assert not left, f"no data in {left}: {prometheus.log()}"
            groups = prometheus.asked("rules")["groups"]
            assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
            assert prometheus.asked("query", query='ALERTS{alertstate="firing"}')["result"] == []
            (told,) = prometheus.asked("query", query='beit_build_info{kind="pretraining"}')["result"]
            assert told["metric"]["run"] == "tiny"
            assert "exported_run" not in told["metric"]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
                assert json.load(answer)["state"] == "working"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert promtool("check", "metrics", text=answer.read().decode()) == ""
            drawn = tmp_path / "drawn.png"
            arguments = ["--prometheus", prometheus.url, "--run", "tiny", "--out", str(drawn)]
            assert load_tool("draw_dashboard").main(arguments) == 0
            said = capsys.readouterr().out
            assert f"wrote {drawn}" in said
            assert "no data in" not in said
            assert drawn.read_bytes().startswith(b"\x89PNG")
        finally:
            _stop(run, training)


@contextlib.contextmanager
def _cached_reads() -> Iterator[int]:
    """The port of an exporter that tells of what a run without a store does not have: a cache."""
    metrics = TrainingMetrics(m for m in _tables() if m.name == "beit_data_cache_lookups")
    metrics.add("beit_data_cache_lookups", result="hit")
    port = metrics.serve(LoggingConfig(metrics_port=0))
    assert port is not None
    try:
        yield port
    finally:
        metrics.close()


def _stop(run: Run, training: Any) -> None:
    """Ask the run to stop, and wait for it."""
    if training.poll() is None and (run.folder / "run.json").exists():
        os.kill(run.facts()["ranks"][0]["pid"], signal.SIGTERM)
    code, output = wait(training, 60)
    assert code == 0, output


@pytest.mark.server
def test_promtool_has_nothing_against_what_workers_and_any_training_serve(
    promtool: Callable[..., str], trained: tuple[Metric, ...]
) -> None:
    training, worker = TrainingMetrics(trained), Metrics(3)
    for metric in trained:
        labels = dict.fromkeys(metric.labels, "x")
        if metric.kind == "counter":
            training.add(metric.name, **labels)
        elif metric.kind == "histogram":
            training.observe(metric.name, 1.0)
        elif metric.kind == "gauge":
            training.set_labelled(metric.name, 1.0, **labels) if labels else training.set({metric.name: 1.0})
    worker.plan(1, 1, 0, 0)
    _work(worker)
    port = training.serve(LoggingConfig(metrics_port=0))
    try:
        with Exporter(worker, 0, None) as exporter:
            for each, table in ((port, trained), (exporter.port, TOKENISING)):
                with urllib.request.urlopen(f"http://127.0.0.1:{each}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
                assert promtool("check", "metrics", text=text) == ""
                served = set(re.findall(r"^(\w+)", re.sub(r"^#.*$", "", text, flags=re.MULTILINE), re.MULTILINE))
                created = {name for name in served if name.endswith("_created")}
                assert served - created == _exported(table)
    finally:
        training.close()
