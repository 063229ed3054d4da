"""Write the parts of the documentation that are made from the code: the tables of metrics, settings and plans.

A table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`. Without arguments every page is brought
up to date; the test of the pages runs this with --check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from beit_dist.config.finetuning import FinetuningConfig, MixingConfig
from beit_dist.config.model import ModelConfig
from beit_dist.config.pretraining import PretrainingConfig, PretrainingValidation
from beit_dist.config.probing import ProbeConfig
from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.engine.metrics import METRICS, Metric, table_of
from beit_dist.engine.task import Task
from beit_dist.errors import exit_cleanly
from beit_dist.models.heads.targets import HEADS
from beit_dist.tasks.finetuning.classification import Classification
from beit_dist.tasks.finetuning.segmentation import Segmentation
from beit_dist.tasks.pretraining.task import Pretraining
from beit_dist.tasks.tokenizer.task import TokenizerTraining
from beit_dist.tokenizing.metrics import METRICS as TOKENISING
from doc_scaling import BATCH, breaking, memory, speed
from doc_settings import own, shared

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ENDINGS = {"counter": "_total", "info": "_info"}

Rows = Iterable[Sequence[str]]


def tasks() -> tuple[Task[Any, Any, Any], ...]:
    """Of each kind of training, with each of the heads."""
    probed = PretrainingValidation(probe=ProbeConfig(data="labelled"))
    targets = (
        PretrainingConfig(run="run", model=ModelConfig(target=target), validation=probed) for target in HEADS
    )
    return (
        *map(Pretraining, targets),
        TokenizerTraining(TokenizerConfig(run="run"), Path("tokenizer.safetensors")),
        *(Classification(FinetuningConfig(run="run", mixing=MixingConfig(probability=p))) for p in (0, 1)),
        Segmentation(FinetuningConfig(run="run", task="segmentation")),
    )


def metrics_of(kind: str) -> tuple[Metric, ...]:
    """What a kind of training exports besides what every kind does."""
    tables = [
        table_of((*task.numbers, *task.known), task.measured, task.metrics)
        for task in tasks()
        if task.kind == kind
    ]
    return tuple(dict.fromkeys(metric for table in tables for metric in table if metric not in METRICS))


def metric_rows(metrics: Iterable[Metric]) -> Rows:
    """A row for each metric, under a heading."""
    yield "name", "kind", "labels", "meaning"
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"`{metric.name}{_ENDINGS.get(metric.kind, '')}`", metric.kind, labels, metric.help


def text_of(rows: Rows) -> str:
    """A table in Markdown; its first row is the heading."""
    heading, *others = rows
    lines = [heading, ["---"] * len(heading), *others]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


TABLES: dict[str, Callable[[], str]] = {
    "metrics": lambda: text_of(metric_rows(METRICS)),
    "metrics-pretraining": lambda: text_of(metric_rows(metrics_of("pretraining"))),
    "metrics-tokenizer": lambda: text_of(metric_rows(metrics_of("tokenizer"))),
    "metrics-classification": lambda: text_of(metric_rows(metrics_of("classification"))),
    "metrics-segmentation": lambda: text_of(metric_rows(metrics_of("segmentation"))),
    "metrics-tokenising": lambda: text_of(metric_rows(TOKENISING)),
    "settings": shared,
    "settings-pretraining": lambda: own("pre-training"),
    "settings-tokenizer": lambda: own("tokenizer"),
    "settings-finetuning": lambda: own("fine-tuning"),
    "scaling-base": lambda: text_of(speed("beit_base_22k")),
    "scaling-base-larger": lambda: text_of(speed("beit_base_22k", f"global_batch={BATCH}")),
    "scaling-large": lambda: text_of(speed("beit_large_22k")),
    "scaling-large-larger": lambda: text_of(speed("beit_large_22k", f"global_batch={BATCH}")),
    "breaks-base": lambda: text_of(breaking("beit_base_22k")),
    "breaks-large": lambda: text_of(breaking("beit_large_22k")),
    "memory-large": lambda: text_of(memory("beit_large_22k")),
}
"""What stands between the marks of a page, by name."""


def updated(page: str) -> str:
    """A page with its tables as the code has them now."""
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where ``--check`` finds a page that is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; name what is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'out of date; run tools/doc_tables.py' if check else 'updated'}", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    exit_cleanly(main)
