"""The picture of the dashboard: Grafana's units and names, gaps, and what is said where nothing is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from support.http_thread import HttpThread

from beit_dist.errors import DataError


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("draw_dashboard")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "percentunit", "12.3 %"),
        (1.0, "percentunit", "100 %"),
        (0.004, "sci", "4.0e-3"),
        (42.0, "s", "42 s"),
        (900.0, "s", "15 min"),
        (3.5e13, "FLOPS", "35 TF/s"),
        (2.5e6, "Bps", "2.5 MB/s"),
        (3 * 2**30, "bytes", "3 GiB"),
        (5.0, "bytes", "5 B"),
        (0.5, "reqps", "0.5/s"),
        (12345.6, "none", "12,346"),
        (6.2383, "none", "6.24"),
    ],
)
def test_numbers_stand_in_their_units(tool: ModuleType, value: float, unit: str, text: str) -> None:
    assert tool.form(value, unit) == text


def test_every_unit_of_the_dashboard_is_known(tool: ModuleType) -> None:
    panels = json.loads(tool.DASHBOARD.read_text())["panels"]
    for panel in panels:
        if panel["type"] != "row":
            assert tool.form(1.0, panel["fieldConfig"]["defaults"]["unit"])


def test_lines_are_named_as_grafana_names_them(tool: ModuleType) -> None:
    assert tool.named("{{job}} {{ cause }}", {"job": "beit", "cause": "throttled"}) == "beit throttled"
    assert tool.named("free", {"job": "beit"}) == "free"


def test_durations_of_prometheus_are_read(tool: ModuleType) -> None:
    assert [tool.seconds_of(text) for text in ("15s", "1m30s", "500ms", "1h")] == [15, 90, 0.5, 3600]


def test_nothing_is_drawn_over_a_gap(tool: ModuleType) -> None:
    line = tool.Line({}, np.array([0.0, 10, 20, 60, 70]), np.array([1.0, 2, 3, 4, 5]))
    times, values = tool._with_gaps(line, tool.Window(0, 100, 10, 40))
    np.testing.assert_equal(values, [1, 2, 3, math.nan, 4, 5])
    assert len(times) == len(values)


def test_rows_that_are_left_out_leave_no_hole(tool: ModuleType) -> None:
    panels = json.loads(tool.DASHBOARD.read_text())["panels"]
    kept = tool._in_rows(panels, ["Learning", "Tokenising"])
    assert [panel["title"] for panel in kept if panel["type"] == "row"] == ["Learning", "Tokenising"]
    filled = {
        y for place in (panel["gridPos"] for panel in kept) for y in range(place["y"], place["y"] + place["h"])
    }
    assert filled == set(range(max(filled) + 1))


class Api(BaseHTTPRequestHandler):
    """Prometheus with a run that has one metric, a straight line, and nothing else."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path.endswith("status/config"):
            data: object = {"yaml": "global: {scrape_interval: 15s}"}
        else:
            times = [float(asked["end"]) - 15 * place for place in range(20, 0, -1)]
            series = {"metric": {}, "values": [[time, str(place)] for place, time in enumerate(times)]}
            known = 'run="base"' in asked["query"] and (
                "up{" in asked["query"] or "beit_train_epoch" in asked["query"]
            )
            data = {"result": [series] if known else []}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""


def test_panels_without_data_are_named_and_a_run_that_is_not_there_is_an_error(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures" / "run.png"
    with HttpThread(Api) as server:
        where = ["--prometheus", server.url, "--out", str(out)]
        assert tool.main([*where, "--run", "base", "--rows", "Run"]) == 0
        said = capsys.readouterr().out
        assert "no data in: Progress, Time left, Since the last step, Age of the last checkpoint" in said
        assert "Epoch" not in said
        assert out.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(
            DataError, match=r"--run other: no target with this label answered in the last 6 hours"
        ):
            tool.main([*where, "--run", "other"])
    with pytest.raises(DataError, match="no answer from a Prometheus there"):
        tool.main([*where, "--run", "base"])
