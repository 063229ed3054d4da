"""Train the same small runs with a base commit and with this work tree, and compare everything they leave.

For a change of the code that must not change a number. Both kinds of training run at several ZeRO stages, on one
rank and on two, with accumulation, averaged weights and a held-out loss, and once killed and resumed; the offline
job makes its shards with each. Compared are every line of numbers, the state's digests and the files of the last
checkpoint, the tokenizer and the shards. No digest is kept anywhere: they differ by processor.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from tqdm import tqdm

from beit_dist.errors import UserError, exit_cleanly
from beit_dist.weights.tokenizer_files import tokenizer_digest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = """\
examples:
  python tools/same_runs.py main
  python tools/same_runs.py HEAD~3 --only tokenizer --keep /tmp/same
"""

RENAMED: dict[str, dict[str, str]] = {
    "tokenizer": {
        "batch": "global_batch",
        "lr": "optimizer.lr",
        "warmup_steps": "optimizer.warmup_steps",
        "ema": "ema.decay",
        "measure_every_steps": "validation.every_steps",
    }
}
"""Settings of a base commit that has no tasks yet, by kind of training, and the names that they have now."""
OF_THE_START = {"attempt", "time", "seconds", "images_per_second", "data_wait", "peak_memory"}
"""Keys of a line of numbers that say when and in which start it was made."""
NEW = {"samples", "first_batch", "top5_accuracy"}
"""Keys that only one of the two may have."""

MODEL = {"size": "tiny", "width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 16}
PRETRAINING: dict[str, Any] = {
    "model": {**MODEL, "drop_path": 0.2},
    "masking": {"min_block": 4},
    "global_batch": 8,
    "micro_batch": 2,
    "steps": 12,
    "optimizer": {"lr": 1e-2, "warmup_steps": 3},
    "loader": {"workers": 1, "lanes": 4},
    "checkpoint": {"every_steps": 4, "every_minutes": None},
    "logging": {"every_steps": 1, "metrics_port": None},
}
TOKENIZER: dict[str, Any] = {
    "model": {"vocabulary": 16, "hidden": 8, "blocks_per_group": 1, "decoder_input": 8},
    "view_size": 32,
    "image_size": 16,
    "global_batch": 4,
    "micro_batch": 1,
    "steps": 10,
    "optimizer": {"warmup_steps": 3},
    "held_out": 4,
    "usage_weight": 10.0,
    "kl_weight": 0.1,
    "validation": {"every_steps": 5},
    "collapse": {"below": None},
    "checkpoint": {"every_steps": 4, "every_minutes": None},
    "logging": {"metrics_port": None, "every_steps": 1},
}


@dataclass(frozen=True)
class Case:
    """One run of either kind."""

    name: str
    kind: str
    """``pretraining`` or ``tokenizer``."""
    stage: int | None = None
    """Of ZeRO; None for a tokenizer without ``--ds_config``."""
    bf16: bool = False
    ranks: int = 1
    changes: tuple[tuple[str, Any], ...] = ()
    """Settings in place of the recipe's."""
    killed_at: int | None = None
    """The step after which all ranks are killed, to be started again."""


FP32 = (("precision", "fp32"),)
CASES = (
    Case("stage 0, fp32", "pretraining", 0),
    Case("stage 1, fp32, average, held-out loss", "pretraining", 1, ranks=2, changes=(("ema", {"decay": 0.9}),)),
    Case("stage 1, bf16, killed and resumed", "pretraining", 1, bf16=True, ranks=2, killed_at=6),
    Case("stage 2, fp32, recomputed", "pretraining", 2, ranks=2, changes=(("activation_checkpointing", True),)),
    Case("stage 3, bf16", "pretraining", 3, bf16=True, ranks=2),
    Case("without JSON", "tokenizer", changes=FP32),
    Case("stage 1, fp32, killed and resumed", "tokenizer", 1, ranks=2, killed_at=6),
    Case("stage 2, bf16", "tokenizer", 2, bf16=True, ranks=2),
)


@dataclass(frozen=True)
class Tree:
    """A checkout, and the folder in which its runs lie."""

    code: Path
    out: Path
    renamed: Mapping[str, Mapping[str, str]]
    """By kind of training, the names that settings have in this checkout, and those of now."""

    def recipe(self, kind: str, settings: Mapping[str, Any]) -> str:
        """Settings in the words of this checkout, as a recipe."""
        written = copy.deepcopy(dict(settings))
        for then, now in self.renamed.get(kind, {}).items():
            *sections, last = now.split(".")
            inner = functools.reduce(lambda tree, name: tree.get(name, {}), sections, written)
            if last in inner:
                written[then] = inner.pop(last)
        return yaml.safe_dump({name: value for name, value in written.items() if value != {}})

    def run(self, *command: str) -> None:
        """Run a command of this checkout to its end.

        Raises:
            UserError: it failed.
        """
        process = self.start(command)
        output, _ = process.communicate()
        if process.returncode:
            raise UserError(f"{' '.join(command)}, in {self.code}, failed:\n{output[-3000:]}")

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command of this checkout."""
        environment = {**os.environ, "PYTHONPATH": str(self.code), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=self.code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def prepare(tree: Tree, images: Path) -> dict[str, str]:
    """Make a tokenizer and two data sets with it; their digests."""
    recipe, tokenizer = tree.out / "first.yaml", tree.out / "first.safetensors"
    recipe.write_text(tree.recipe("tokenizer", {**TOKENIZER, **dict(FP32)}))
    given = ("--images", str(images), "--config", str(recipe))
    tree.run(sys.executable, "tools/train_tokenizer.py", *given, "--out", str(tokenizer))
    found = {"tokenizer": tokenizer_digest(tokenizer)}
    for name, seed in (("shards", "0"), ("held-out", "1")):
        given = ("--images", str(images), "--tokenizer", str(tokenizer), "--image-size", "32", "--patch-size", "8")
        more = ("--out", str(tree.out / name), "--views", "2", "--seed", seed, "--shard-samples", "16")
        tree.run(sys.executable, "tools/shard_tokens.py", *given, *more)
        found[name] = digest(tree.out / name / "manifest.json")  # it holds the digests of all shards
    return found


def train(tree: Tree, case: Case, images: Path, port: int) -> dict[str, Any]:
    """Do one run; all that it left and that must be the same."""
    base = tree.out / f"{case.kind}-{case.name}".replace(" ", "-").replace(",", "")
    run, recipe, tokenizer = base.with_name(f"{base.name}.run"), Path(f"{base}.yaml"), Path(f"{base}.safetensors")
    command = [sys.executable]
    if case.ranks > 1:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--num_accelerators", str(case.ranks), "--master_port", str(port)]
    if case.kind == "tokenizer":
        recipe.write_text(tree.recipe(case.kind, {**TOKENIZER, **dict(case.changes)}))
        command += ["tools/train_tokenizer.py", "--images", str(images), "--out", str(tokenizer)]
        command += ["--run", str(run)]
    else:
        settings = {**PRETRAINING, **dict(case.changes), "run": str(run), "data": str(tree.out / "shards")}
        if "held-out" in case.name:
            settings["validation"] = {"data": str(tree.out / "held-out"), "every_steps": 4, "samples": 16}
        recipe.write_text(tree.recipe(case.kind, settings))
        command += ["beit_dist/train.py"]
    if case.stage is not None:
        ds_config = Path(f"{base}.json")
        sums = {} if case.stage == 0 else {"data_types": {"grad_accum_dtype": "fp32"}}
        zero = {"zero_optimization": {"stage": case.stage}, "bf16": {"enabled": case.bf16}}
        ds_config.write_text(json.dumps({**zero, **sums}))
        command += ["--ds_config", str(ds_config)]
    command += ["--config", str(recipe)]
    if case.killed_at is not None:
        kill_after(tree, command, run, case.killed_at)
    tree.run(*command)
    return left_by(run) | ({"tokenizer": tokenizer_digest(tokenizer)} if case.kind == "tokenizer" else {})


def kill_after(tree: Tree, command: Sequence[str], run: Path, step: int) -> None:
    """Start a run, and kill all its processes with -9 once a step is recorded."""
    process = tree.start(command)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        if process.poll() is not None:
            raise UserError(f"{run} ended before its step {step}:\n{process.communicate()[0][-3000:]}")
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)
    process.communicate()


def left_by(run: Path) -> dict[str, Any]:
    """What a finished run left: numbers, and the last checkpoint's digests and files."""
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    found: dict[str, Any] = {
        "state": manifest["state_digests"],
        "position": {name: manifest["position"].get(name) for name in ("consumed",)},
    }
    found["files"] = {f["file"]: f["sha256"] for f in manifest["files"] if f["file"].endswith(".safetensors")}
    for name in ("metrics.jsonl", "validation.jsonl"):
        if (run / name).exists():
            found[name] = [comparable(json.loads(line)) for line in (run / name).read_text().splitlines()]
    return found


def comparable(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of numbers without what belongs to the start that made it."""
    return {name: value for name, value in line.items() if name not in OF_THE_START}


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(base: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each place where two trees of values differ, with both values."""
    if isinstance(base, dict) and isinstance(now, dict):
        for name in [*base, *(name for name in now if name not in base)]:
            if name in NEW and not (name in base and name in now):
                continue
            yield from differences(base.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif isinstance(base, list) and isinstance(now, list) and len(base) == len(now):
        for number, (one, other) in enumerate(zip(base, now, strict=True), start=1):
            yield from differences(one, other, f"{path}[{number}]")
    elif base != now:
        yield f"{path}: {str(base)[:70]} in the base, {str(now)[:70]} now"


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of ``commit``, removed afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*git, "add", "--detach", str(folder), commit], capture_output=True, text=True)
    if added.returncode:
        raise UserError(f"{commit}: {added.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 0 where all is equal, 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="COMMIT", help="what to compare this work tree with")
    parser.add_argument("--only", metavar="TEXT", default="", help="runs whose kind and name contain this")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave all that was made there")
    parser.add_argument(
        "--port", metavar="P", type=int, default=21001, help="first port of the ranks (default: 21001)"
    )
    options = parser.parse_args(argv)
    cases = [case for case in CASES if options.only in f"{case.kind}: {case.name}"]
    with contextlib.ExitStack() as stack:
        out = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-runs-")))
        code = stack.enter_context(checked_out(options.base, out / "code"))
        trees = (
            Tree(code, out / "base", {} if (code / "beit_dist" / "tasks").is_dir() else RENAMED),
            Tree(ROOT, out / "now", {}),
        )
        images = out / "corpus" / "images"
        for tree in trees:
            tree.out.mkdir(parents=True)
        trees[1].run(
            *(
                sys.executable,
                "tools/make_corpus.py",
                "--out",
                str(out / "corpus"),
                "--images",
                "40",
                "--size",
                "48",
            )
        )
        failed = report("tokenizer and shards", *(prepare(tree, images) for tree in trees))
        for number, case in enumerate(tqdm(cases, unit="run", disable=not sys.stderr.isatty())):
            left = [train(tree, case, images, options.port + 2 * number + i) for i, tree in enumerate(trees)]
            failed |= report(f"{case.kind}: {case.name}", *left)
    return int(failed)


def report(name: str, base: Any, now: Any) -> bool:
    """Print how a case came out; whether something differs."""
    found = list(differences(base, now))
    print(f"{'DIFFERS' if found else 'equal':<8} {name}", flush=True)
    for line in found[:6]:
        print(f"           {line}")
    if len(found) > 6:
        print(f"           and {len(found) - 6} more")
    return bool(found)


if __name__ == "__main__":
    exit_cleanly(main)
