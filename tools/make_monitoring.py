"""Write what is made of other things in ``cluster/monitoring``: Grafana's dashboard and Kubernetes' rules.

The dashboard of a run, for Grafana 10 and later, is made from the table of panels below. The ``PrometheusRule`` of
the Prometheus Operator has the groups of ``rules.yaml`` and ``alerts.yaml``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from beit_dist.errors import exit_cleanly

FOLDER = Path(__file__).resolve().parents[1] / "cluster" / "monitoring"
_SCHEMA = 39  # of the JSON model, Grafana 10.4
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_RUN = '{run="$run"}'


@dataclass(frozen=True)
class Query:
    """One of a panel's."""

    expr: str
    """In PromQL; ``RUN`` stands for the chosen run."""
    legend: str

    @property
    def text(self) -> str:
        """As Grafana sends it, variables aside."""
        return self.expr.replace("{RUN}", _RUN).replace("RUN,", 'run="$run",')


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: above it.
        unit: of Grafana.
        queries: what it shows.
        about: shown on demand.
        kind: of Grafana.
        width: in columns of 24.
        log: on a logarithmic axis.
        most: where the axis ends.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""
    kind: str = "timeseries"
    width: int = 8
    log: bool = False
    most: float | None = None


def of(*pairs: str) -> tuple[Query, ...]:
    """Queries from expressions and legends in turn."""
    return tuple(Query(expr, legend) for expr, legend in zip(pairs[::2], pairs[1::2], strict=True))


def _number(title: str, unit: str, expr: str, about: str = "", most: float | None = None) -> Panel:
    return Panel(title, unit, of(expr, ""), about, kind="stat", width=4, most=most)


_BASELINE = 'beit_train_baseline{RUN,number="NUMBER",data="DATA"}'


def _baseline(number: str, data: str) -> str:
    return _BASELINE.replace("NUMBER", number).replace("DATA", data)


def _mean(metric: str) -> str:
    return f"{metric}_sum{{RUN}} / ({metric}_count{{RUN}} > 0)"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Run": (
        _number("Progress", "percentunit", "beit:train_progress:ratio{RUN}", most=1),
        _number("Time left", "s", "beit:train_time_left:seconds{RUN}", "At the pace of the last 15 minutes."),
        _number("Since the last step", "s", "time() - beit_train_last_step_timestamp_seconds{RUN}"),
        _number("Age of the last checkpoint", "s", "beit:checkpoint_age:seconds{RUN}"),
        _number("Epoch", "none", "beit_train_epoch{RUN}"),
        _number(
            "Start of the run", "none", "beit_train_attempt{RUN}", "Each start of the run has the next number."
        ),
    ),
    "Learning": (
        Panel(
            "Loss",
            "none",
            of(
                *("beit_train_loss{RUN}", "training"),
                *("beit_validation_loss{RUN}", "held out"),
                *(_baseline("loss", "training"), "{{baseline}}"),
            ),
            "Baselines are what the loss would be without learning from images.",
            width=6,
        ),
        Panel(
            "Accuracy",
            "percentunit",
            of(
                *("beit_train_accuracy_ratio{RUN}", "training"),
                *("beit_validation_accuracy_ratio{RUN}", "held out"),
                *(_baseline("accuracy", "training"), "{{baseline}}"),
            ),
            width=6,
        ),
        Panel("Learning rate", "sci", of("beit_train_learning_rate{RUN}", "learning rate"), width=4),
        Panel(
            "Gradient norm",
            "none",
            of("beit_train_grad_norm{RUN}", "before clipping"),
            "Global L2 norm.",
            width=4,
            log=True,
        ),
        Panel(
            "Unusual steps",
            "none",
            of(
                *("increase(beit_train_steps_skipped_total{RUN}[$__rate_interval])", "skipped"),
                *("increase(beit_train_loss_spikes_total{RUN}[$__rate_interval])", "spikes"),
                *("increase(beit_data_bad_samples_total{RUN}[$__rate_interval])", "damaged"),
            ),
            "Skipped: gradients not finite, no update. Spikes: a loss far above those before. Damaged: samples.",
            width=4,
        ),
    ),
    "Speed": (
        Panel("Samples a second", "none", of("beit_train_samples_per_second{RUN}", "all ranks")),
        Panel(
            "Model FLOP/s",
            "FLOPS",
            of(
                "beit_train_model_flops_per_second{RUN}", "all ranks", "beit:train_flops:avg10m{RUN}", "10 minutes"
            ),
            "Of forward and backward as the model is written, without recomputation.",
        ),
        Panel(
            "Waiting for data",
            "percentunit",
            of("beit_data_wait_ratio{RUN}", "rank 0", "beit:data_wait:avg10m{RUN}", "10 minutes"),
            "Share of the time. BeitDataBound fires above 20 %.",
            most=1,
        ),
        Panel(
            "Bytes read by rank 0",
            "Bps",
            of("rate(beit_data_read_bytes_total{RUN}[$__rate_interval])", "{{source}}"),
        ),
        Panel(
            "Stragglers: cost",
            "percentunit",
            of("beit_train_straggler_cost_ratio{RUN}", "of a step"),
            "Share of a step by which the slowest rank's own time exceeds the mean.",
            width=8,
        ),
        Panel(
            "Stragglers: slowest rank",
            "none",
            of(
                *("beit_train_slowest_rank{RUN}", "rank"),
                *("beit_train_step_duration_max_over_mean_ratio{RUN}", "its time over the mean"),
            ),
        ),
    ),
    "Checkpoints and storage": (
        Panel(
            "Age of the last checkpoint",
            "s",
            of("beit:checkpoint_age:seconds{RUN}", "age", "beit:checkpoint_interval:seconds{RUN}", "due after"),
        ),
        Panel(
            "Duration of a save, on average",
            "s",
            of(
                *(_mean("beit_checkpoint_duration_seconds"), "until committed"),
                *(_mean("beit_checkpoint_stall_seconds"), "of which training waits"),
                *(_mean("beit_validation_duration_seconds"), "a measurement"),
            ),
            log=True,
        ),
        Panel("Checkpoints of this start", "none", of("beit_checkpoint_saves_total{RUN}", "{{result}}")),
        Panel("Space left for the run", "bytes", of("beit_run_disk_free_bytes{RUN}", "free")),
        Panel(
            "Requests sent again",
            "reqps",
            of("rate(beit_storage_retries_total{RUN}[$__rate_interval])", "{{job}} {{cause}}"),
        ),
        Panel(
            "Blocks in the cache",
            "ops",
            of("rate(beit_data_cache_lookups_total{RUN}[$__rate_interval])", "{{result}}"),
            "Empty without loader.cache_dir.",
        ),
    ),
    "Tokenising": (
        Panel(
            "Images done",
            "percentunit",
            of(
                "sum by (run) (beit_tokenize_images_total) / sum by (run) (beit_tokenize_images_planned)",
                "{{run}}",
            ),
            "All jobs that Prometheus sees.",
            most=1,
        ),
        Panel("Images a second", "none", of("sum by (run) (rate(beit_tokenize_images_total[5m]))", "{{run}}")),
        Panel(
            "Share of the time by stage",
            "percentunit",
            of(
                "sum by (stage) (rate(beit_tokenize_stage_seconds_total[5m]))"
                " / ignoring (stage) group_left () sum(rate(beit_tokenize_stage_seconds_total[5m]) > 0)",
                "{{stage}}",
            ),
        ),
        Panel(
            "Images rejected", "none", of("sum by (reason) (beit_tokenize_images_rejected_total)", "{{reason}}")
        ),
        Panel(
            "Shards left",
            "none",
            of("beit_tokenize_shards_planned - beit_tokenize_shards_finished", "worker {{worker}}"),
        ),
        Panel(
            "Since images were written",
            "s",
            of("time() - beit_tokenize_last_progress_timestamp_seconds", "worker {{worker}}"),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The JSON model."""
    return {
        "uid": "beit-dist-run",
        "title": "beit_dist: a run",
        "tags": ["beit_dist"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(_variables())},
        "annotations": {"list": [_starts()]},
        "panels": list(_panels()),
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    query = "label_values(beit_train_target_steps, run)"
    yield {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run", "qryType": 1},
        "refresh": 2,
        "sort": 1,
    }


def _starts() -> dict[str, Any]:
    return {
        "name": "Starts of the run",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": f"1000 * beit_train_start_timestamp_seconds{_RUN}",
        "useValueForTime": True,
        "titleFormat": "start of the run",
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, panels in ROWS.items():
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        left, height = 0, 4 if panels[0].kind == "stat" else 8
        for panel in panels:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + height
            number += 1
            place = {"h": height, "w": panel.width, "x": left, "y": top}
            yield {"id": number, "gridPos": place, **_picture(panel)}
            left += panel.width
        top += height


def _picture(panel: Panel) -> dict[str, Any]:
    options: dict[str, Any] = {"unit": panel.unit}
    if panel.most is not None:
        options |= {"min": 0, "max": panel.most}
    if panel.kind == "timeseries":
        scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
        options["custom"] = {"lineWidth": 1, "showPoints": "never", "scaleDistribution": scale}
    targets = [
        {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": query.text, "legendFormat": query.legend}
        for place, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": options, "overrides": []},
    }


def dashboard_text() -> str:
    """``beit.json``."""
    return json.dumps(dashboard(), indent=1) + "\n"


def rules_text() -> str:
    """The ``PrometheusRule``, which holds the groups of both files of rules."""
    groups = []
    for name in ("rules.yaml", "alerts.yaml"):
        groups += yaml.safe_load((FOLDER / "prometheus" / name).read_text(encoding="utf-8"))["groups"]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "beit", "labels": {"app.kubernetes.io/name": "beit-dist"}},
        "spec": {"groups": groups},
    }
    heading = "# Made by tools/make_monitoring.py from cluster/monitoring/prometheus/rules.yaml and alerts.yaml.\n"
    return heading + yaml.safe_dump(manifest, sort_keys=False, width=115)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where ``--check`` finds the file out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say what is out of date")
    check = parser.parse_args(arguments).check
    stale = False
    for name, made in (("grafana/beit.json", dashboard_text), ("../kubernetes/monitoring/rules.yaml", rules_text)):
        file, text = (FOLDER / name).resolve(), made()
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        stale = True
        if not check:
            file.write_text(text, encoding="utf-8")
        print(f"{name}: {'out of date; run tools/make_monitoring.py' if check else 'updated'}", file=sys.stderr)
    return int(check and stale)


if __name__ == "__main__":
    exit_cleanly(main)
