"""Draw the panels of Grafana's dashboard from what a Prometheus holds of a run, without Grafana."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from beit_dist.engine.durations import duration
from beit_dist.errors import DataError, exit_cleanly
from beit_dist.reports.names import verbatim

DASHBOARD = Path(__file__).resolve().parents[1] / "cluster" / "monitoring" / "grafana" / "beit.json"
EXAMPLES = """\
examples:
  python tools/draw_dashboard.py --prometheus http://localhost:9090 --run base --out dashboard.png
  python tools/draw_dashboard.py --run base --hours 24 --rows Learning Speed --out learning.png
"""
_WIDTH, _UNIT, _COLUMNS = 9.0, 0.185, 24
"""Inches of the picture's width and of a unit of height; columns of Grafana's grid."""
_SIDE, _DPI, _POINTS = 0.5, 170, 300
"""Inches for the numbers of an axis; shown 900 points wide, a picture has letters of 8; values of a line."""
_COLOURS = ("#3b7dd8", "#e0752d", "#4a9a3f", "#8d5fc9", "#c0392b", "#7f8c8d", "#b8860b", "#16a0a0")
_PALETTE = 128
_QUIET, _FRAME, _START = "0.40", "0.85", "#f2a03d"


@dataclass(frozen=True)
class Line:
    """A series of a query's answer."""

    labels: Mapping[str, str]
    times: NDArray[np.float64]
    """Unix times."""
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """The time that is drawn, in Unix time, and how finely."""

    begin: float
    end: float
    step: float
    rate: float
    """Seconds that Grafana takes for ``$__rate_interval``."""


class Prometheus:
    """A server's HTTP API.

    Args:
        url: where it listens.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def range(self, query: str, begin: float, end: float, step: float) -> list[Line]:
        """What a query gives over a time; gaps are left out.

        Raises:
            DataError: the server does not answer, or refuses the query.
        """
        asked = {"query": query, "start": begin, "end": end, "step": step}
        lines = []
        for series in self._get("query_range", asked)["result"]:
            times, values = (np.array(column, dtype=np.float64) for column in zip(*series["values"], strict=True))
            lines.append(Line(series["metric"], times, values))
        return lines

    def scrape_interval(self) -> float:
        """Seconds between two scrapes, as its configuration has it."""
        config = yaml.safe_load(self._get("status/config", {})["yaml"])
        return seconds_of(config["global"]["scrape_interval"])

    def _get(self, path: str, parameters: Mapping[str, Any]) -> Any:
        where = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(where, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise DataError(f"--prometheus {self._url}: {parameters.get('query', path)}: {said}") from None
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"--prometheus {self._url}: no answer from a Prometheus there ({error})") from None


def seconds_of(text: str) -> float:
    """A duration as Prometheus writes it: ``1m30s``, ``500ms``."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd])", text))


def window_of(server: Prometheus, run: str, hours: float) -> Window:
    """The time in which a run's targets were scraped, within the last ``hours``.

    Raises:
        DataError: they were not.
    """
    now, interval = time.time(), server.scrape_interval()
    coarse = max(interval, hours * 3600 / 10_000)  # Prometheus answers at most 11,000 values
    seen = server.range(f'up{{run="{run}"}} > 0', now - hours * 3600, now, coarse)
    if not seen:
        raise DataError(f"--run {run}: no target with this label answered in the last {hours:g} hours")
    begin, end = min(line.times[0] for line in seen), max(line.times[-1] for line in seen)
    step = max(interval, (end - begin) / _POINTS)
    return Window(begin, end, step, max(step + interval, 4 * interval))


@dataclass(frozen=True)
class Drawn:
    """A picture, and the panels that have no data in it."""

    figure: Figure
    empty: tuple[str, ...]


def draw(dashboard: Mapping[str, Any], server: Prometheus, run: str, window: Window, rows: Sequence[str]) -> Drawn:
    """The dashboard's panels in its own grid.

    Args:
        dashboard: Grafana's JSON model.
        rows: titles of those that are drawn.

    Raises:
        DataError: the server refuses a query.
    """
    panels = _in_rows(dashboard["panels"], rows)
    units = max(place["y"] + place["h"] for place in (panel["gridPos"] for panel in panels))
    figure = Figure(figsize=(_WIDTH, units * _UNIT), dpi=_DPI, facecolor="white")

    def answers(target: Mapping[str, Any]) -> list[Line]:
        query = target["expr"].replace("$run", run).replace("$__rate_interval", f"{window.rate * 1000:.0f}ms")
        return server.range(query, window.begin, window.end, window.step)

    starts = [moment for one in dashboard["annotations"]["list"] for moment in _moments(answers(one), window)]
    empty = []
    for panel in panels:
        if panel["type"] == "row":
            _heading(figure, panel, units)
            continue
        lines = [(target["legendFormat"], line) for target in panel["targets"] for line in answers(target)]
        lines = [(legend, line) for legend, line in lines if np.isfinite(line.values).any()]
        if not lines:
            empty.append(panel["title"])
        paint = {"stat": _stat, "timeseries": _timeseries}[panel["type"]]
        _framed(figure, panel, units)
        paint(_axes(figure, panel, units), panel, lines, window, starts)
    return Drawn(figure, tuple(empty))


def write(figure: Figure, out: Path) -> None:
    """Write a PNG of few colours, which is a third as large."""
    drawn = BytesIO()
    figure.savefig(drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(_PALETTE, Image.Quantize.MAXCOVERAGE).save(
        out, format="PNG", optimize=True
    )


def _in_rows(panels: Sequence[dict[str, Any]], rows: Sequence[str]) -> list[dict[str, Any]]:
    """The panels of some rows, moved up to where those that are left out were."""
    kept, top, shown, shift = [], 0, False, 0
    for panel in panels:
        place = dict(panel["gridPos"])
        if panel["type"] == "row":
            shown = panel["title"] in rows
            shift = place["y"] - top
        if shown:
            place["y"] -= shift
            top = max(top, place["y"] + place["h"])
            kept.append({**panel, "gridPos": place})
    return kept


def _moments(lines: Sequence[Line], window: Window) -> list[float]:
    """Of annotations whose values are their times, in milliseconds."""
    values = {value / 1000 for line in lines for value in line.values}
    return sorted(value for value in values if window.begin <= value <= window.end)


# ---------------------------------------------------------------------------------------------------- the panels


def _box(panel: Mapping[str, Any], units: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of a panel in the figure."""
    place = panel["gridPos"]
    left, width = place["x"] / _COLUMNS, place["w"] / _COLUMNS
    return left, 1 - (place["y"] + place["h"]) / units, width, place["h"] / units


def _heading(figure: Figure, panel: Mapping[str, Any], units: int) -> None:
    left, bottom, _, height = _box(panel, units)
    at = (left + 0.006, bottom + 0.35 * height)
    figure.text(*at, panel["title"], fontsize=8.5, fontweight="bold", va="center")


def _framed(figure: Figure, panel: Mapping[str, Any], units: int) -> None:
    left, bottom, width, height = _box(panel, units)
    gap_x, gap_y = 0.03 / _WIDTH, 0.03 / (units * _UNIT)
    frame = figure.add_axes((left + gap_x, bottom + gap_y, width - 2 * gap_x, height - 2 * gap_y))
    frame.set(xticks=[], yticks=[])
    for spine in frame.spines.values():
        spine.set_color(_FRAME)
    inches = height * units * _UNIT
    at = (left + 0.008, bottom + height * (1 - 0.15 / inches))
    size = 7 if width > 0.2 else 6.5
    figure.text(*at, panel["title"], fontsize=size, va="center")


def _axes(figure: Figure, panel: Mapping[str, Any], units: int) -> Axes:
    """Where the panel's data goes: below its title, beside the labels of its axis."""
    left, bottom, width, height = _box(panel, units)
    inches = height * units * _UNIT
    if panel["type"] == "stat":
        return figure.add_axes((left + 0.004, bottom + 0.004, width - 0.008, height * 0.42))
    side, low, high = _SIDE / _WIDTH, 0.20 / inches, 0.42 / inches
    return figure.add_axes((left + side, bottom + low * height, width - side - 0.010, height * (1 - low - high)))


def _stat(
    axes: Axes,
    panel: Mapping[str, Any],
    lines: Sequence[tuple[str, Line]],
    window: Window,
    starts: Sequence[float],
) -> None:
    """The last value, above its course."""
    axes.set_axis_off()
    axes.set_xlim(window.begin, window.end)
    text = "No data"
    for _, line in lines:
        text = _last(line.values, panel["fieldConfig"]["defaults"]["unit"])
        axes.fill_between(line.times, line.values, color=_COLOURS[0], alpha=0.18, linewidth=0)
        axes.plot(line.times, line.values, color=_COLOURS[0], linewidth=0.7, alpha=0.7)
        axes.set_ylim(0, max(1e-9, 1.05 * np.nanmax(line.values)))
    axes.text(0.5, 1.18, text, transform=axes.transAxes, ha="center", va="center", fontsize=12.5)


def _timeseries(
    axes: Axes,
    panel: Mapping[str, Any],
    lines: Sequence[tuple[str, Line]],
    window: Window,
    starts: Sequence[float],
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    for place, (legend, line) in enumerate(lines):
        label = named(legend, line.labels)
        times, values = _with_gaps(line, window)
        axes.plot(times, values, color=_COLOURS[place % len(_COLOURS)], linewidth=1.0, label=label)
    for moment in starts:
        axes.axvline(moment, color=_START, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_xlim(window.begin, window.end)
    if defaults["custom"]["scaleDistribution"]["type"] == "log":
        axes.set_yscale("log")
    elif lines:
        axes.margins(y=0.08)
        low = min(np.nanmin(line.values) for _, line in lines)
        most = defaults.get("max")
        if low >= 0 and (low == 0 or most is not None):
            axes.set_ylim(0, most if most is not None else max(axes.get_ylim()[1], 1e-9))
    _dress(axes, defaults["unit"], window, bool(lines))


def named(legend: str, labels: Mapping[str, str]) -> str:
    """Grafana's name of a line: ``{{label}}`` stands for its value."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), legend)


def _dress(axes: Axes, unit: str, window: Window, filled: bool) -> None:
    """Scales, their numbers, and the legend below the title."""
    axes.grid(color="0.93", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=6, length=2, pad=2, colors=_QUIET)
    for spine in axes.spines.values():
        spine.set_color(_FRAME)
    inches = axes.get_position().width * _WIDTH
    ticks = np.linspace(window.begin, window.end, 5 if inches > 2 else 3)[1:-1]
    clock = "%H:%M" if window.end - window.begin > 300 else "%H:%M:%S"
    axes.set_xticks(ticks, [datetime.fromtimestamp(tick).strftime(clock) for tick in ticks])
    if not filled:
        axes.set_yticks([])
        middle: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "No data", fontsize=8, color=_QUIET, **middle)
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value, unit)))
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        bases = (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=bases, numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=((0.06 - _SIDE) / inches, 1.02),
        ncols=6,
        frameon=False,
        fontsize=6,
        handlelength=1.0 if inches > 1.5 else 0.7,
        handletextpad=0.4 if inches > 1.5 else 0.3,
        columnspacing=0.9 if inches > 1.5 else 0.5,
        borderpad=0.1,
        borderaxespad=0.1,
    )
    for text in legend.get_texts():
        verbatim(text)


def _with_gaps(line: Line, window: Window) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A line that is not drawn over times without values."""
    (breaks,) = np.nonzero(np.diff(line.times) > 1.5 * window.step)
    return np.insert(line.times, breaks + 1, line.times[breaks]), np.insert(line.values, breaks + 1, math.nan)


# ------------------------------------------------------------------------------------------------------ the units


def _last(values: NDArray[np.float64], unit: str) -> str:
    known = values[np.isfinite(values)]
    return form(float(known[-1]), unit)


def form(value: float, unit: str) -> str:
    """A number in one of Grafana's units."""
    return _UNITS[unit](value)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if abs(value) < 100 else duration(value)


def _binary(value: float) -> str:
    for prefix in ("", "Ki", "Mi", "Gi", "Ti"):
        if abs(value) < 1024 or prefix == "Ti":
            return f"{value:.4g} {prefix}B"
        value /= 1024
    raise ValueError(value)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_UNITS: dict[str, Callable[[float], str]] = {
    "none": _plain,
    "percentunit": lambda value: f"{100 * value:.3g} %",
    "s": _seconds,
    "sci": lambda value: f"{value:.1e}".replace("e-0", "e-").replace("e+00", "e0"),
    "FLOPS": lambda value: EngFormatter("F/s", places=0 if value >= 1e9 else None)(value),
    "Bps": EngFormatter("B/s"),
    "bytes": _binary,
    "reqps": lambda value: f"{value:.3g}/s",
    "ops": lambda value: f"{value:.3g}/s",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = "where it listens (default: %(default)s)"
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL", help=server)
    parser.add_argument("--run", required=True, help="label of the run's targets")
    parser.add_argument("--hours", type=float, default=6, help="how far to look back (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="those to draw (default: all)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the PNG")
    options = parser.parse_args(arguments)
    prometheus = Prometheus(options.prometheus)
    window = window_of(prometheus, options.run, options.hours)
    drawn = draw(dashboard, prometheus, options.run, window, options.rows)
    write(drawn.figure, options.out)
    print(f"wrote {options.out}: {duration(window.end - window.begin)} of {options.run}")
    if drawn.empty:
        print(f"no data in: {', '.join(drawn.empty)}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
