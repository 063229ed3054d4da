"""The benchmarks: ours beside a yardstick in one run, as ratios that a noisy machine cannot fake.

Every contender of a case runs in turn, several times; the median is the value, the range is shown beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from beit_dist.errors import exit_cleanly
from benches.measuring import Row

BENCHES = ("loader", "plan", "masks", "step", "checkpoint", "tokenize")
EXAMPLES = """\
examples:
  python tools/bench.py plan masks
  python tools/bench.py loader --json loader.json
  python tools/bench.py step --quick        # a few seconds, for a look

docs/performance.md holds figures and what they mean.
"""


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch  # not at the top: processes that benchmarks start import this file, too

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(rows: list[Row]) -> None:
    """The rows as a table."""
    print(f"{'bench':<11}{'case':<34}{'who':<20}{'value':>12} {'unit':<14}range")
    for row in rows:
        value, extent = f"{row.value:,.4g}", f"{row.low:,.4g} to {row.high:,.4g}"
        print(f"{row.bench:<11}{row.case:<34}{row.who:<20}{value:>12} {row.unit:<14}{extent}")


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmarks, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", nargs="+", choices=[*BENCHES, "all"], help="what to measure")
    parser.add_argument("--json", metavar="F", type=Path, help="also write the machine and the rows to this file")
    parser.add_argument("--quick", action="store_true", help="small cases and few repetitions")
    args = parser.parse_args(arguments)
    names = BENCHES if "all" in args.bench else args.bench
    rows: list[Row] = []
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"benches.{name}").measure(quick=args.quick)
    about = machine()
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": [vars(row) for row in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
