"""``beit bench``: our parts beside a yardstick in one run, as ratios that a noisy machine cannot fake."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_dist.commands.options import add_json, write_json
from beit_dist.commands.parsing import CommandParser

if TYPE_CHECKING:
    from beit_dist.benches.measuring import Row

SENTENCE = "Measure how fast each part is on this machine."

BENCHES = (
    "ceilings",
    "step",
    "trainer",
    "attention",
    "loader",
    "plan",
    "masks",
    "tokenize",
    "checkpoint",
    "startup",
    "resumed",
)
_NOT_IN_ALL = ("gpu",)

EXAMPLES = """\
  beit bench plan masks
  beit bench loader --json loader.json
  beit bench step --quick                  # a minute, for a look
  beit bench step --original unilm/beit/   # the released code beside the others
  beit bench gpu --json gpu.json           # a GPU in eight minutes, key cases first
"""

MORE = """\
Our code and a yardstick run alternately, several times. The value is the median, with the range beside it.
docs/performance.md has figures and explains them.
"""


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("bench", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to measure")
    what.add_argument("bench", nargs="+", choices=[*BENCHES, *_NOT_IN_ALL, "all"], help="one or several")
    what.add_argument("--quick", action="store_true", help="small cases and few repetitions")
    what.add_argument(
        "--original", metavar="DIR", help="folder of the released code (microsoft/unilm, beit), for step and gpu"
    )
    add_json(parser.add_argument_group("what to write"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks, print a table, and write JSON if asked to."""
    args = parser().parse(argv)
    about = machine()
    if about["gpu"] is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds no GPU
    printed = args.json != "-"
    if printed:
        print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    rows: list[Row] = []
    for name in BENCHES if "all" in args.bench else args.bench:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        more = {"original": args.original} if name in ("step", "gpu") else {}
        for row in importlib.import_module(f"beit_dist.benches.{name}").measure(quick=args.quick, **more):
            rows.append(row)
            if printed:
                print(line(row), flush=True)
    if args.json:
        write_json(args.json, {"machine": about, "rows": [vars(row) for row in rows]})
    return 0


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def line(row: Row) -> str:
    """A row of the table, which grows while it is measured."""
    extent = f"{row.low:,.4g} to {row.high:,.4g}" if row.low != row.high else ""
    return f"{row.bench:<11}{row.case:<34} {row.who:<30}{row.value:>10,.4g} {row.unit:<16}{extent}".rstrip()
