"""The whole system in a few minutes on two CPU cores: images, tokens, shards, a stopped and resumed run, pictures.

It runs the same commands that a user types, prints each before it runs, and skips what an earlier call finished.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import pty
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from beit_dist.config import TrainConfig, load_recipe
from beit_dist.data.manifest import load_manifest
from beit_dist.engine.schedule import steps_of
from beit_dist.errors import UserError, exit_cleanly

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/demo.yaml"
RANKS = 2
# One thread a rank: two ranks on two cores, and the same sums on every machine.
# The models are so small that a second thread helps little, and on a busy machine threads wait for each other.
TOOL_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
RANK_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", **TOOL_ENVIRONMENT}
STOP_SECONDS = 180.0
"""How long a stopped run may take to save and end; a save takes a second or two here."""


FIXED_SECONDS, PRODUCTS = 20.0, 12000.0
"""Seconds that the demo takes on any two free cores, and gigaflops of a core besides: 133 s at 108 GFLOP/s."""


class StageError(UserError):
    """A command of the demo failed or left something out."""

    exit_code = 1


@dataclass(frozen=True)
class Size:
    """How much of everything the demo makes."""

    images: int
    tokenizer: tuple[str, ...] = ()
    """Overrides of configs/tokenizer_demo.yaml."""
    train: tuple[str, ...] = ()
    """Overrides of configs/demo.yaml."""


FULL = Size(images=1200)
FAST = Size(
    images=96,
    tokenizer=("steps=20", "batch=8", "held_out=8"),
    train=("steps=40", "global_batch=32", "micro_batch=16", "logging.every_steps=1"),
)


@dataclass(frozen=True)
class Stage:
    """One command and what it leaves in the demo's folder."""

    name: str
    title: str
    arguments: tuple[str, ...]
    output: str
    besides: tuple[str, ...] = ()
    """What else it leaves, which another command must not find."""
    trains: bool = False
    """On all ranks, by the launcher."""


class Shown:
    """A running command whose output goes to the terminal and to a file.

    Args:
        command: program and arguments, run at the repository's root.
        log: the file, written anew.
        env: the command's environment; by default ours.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        terminal = sys.stdout.isatty()
        reader, writer = pty.openpty() if terminal else os.pipe()  # progress bars show on a terminal only
        if terminal:
            fcntl.ioctl(writer, termios.TIOCSWINSZ, fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, bytes(8)))
        try:
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=writer, stderr=writer)
        finally:
            os.close(writer)
        self._copier = threading.Thread(target=self._copy, args=(reader,), daemon=True)
        self._copier.start()

    def __enter__(self) -> Shown:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """End what still runs, with all it has started: the way out of an error or of Ctrl-C."""
        if self.poll() is not None:
            return
        processes = [*self.descendants(), psutil.Process(self._process.pid)]
        for process in processes:
            process.terminate()
        for process in psutil.wait_procs(processes, timeout=30)[1]:
            process.kill()

    def descendants(self) -> list[psutil.Process]:
        """All processes the command has started, and theirs."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, once all its output is shown too; None if it still runs after ``timeout`` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        self._copier.join(timeout=10)  # not for ever: an orphan may hold the other end
        return code

    def tail(self, lines: int) -> str:
        """The last lines of its output, indented."""
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        return "\n".join(f"  | {line}" for line in [line for line in text.splitlines() if line.strip()][-lines:])

    def _copy(self, reader: int) -> None:
        with self.log.open("wb") as log, open(reader, "rb", buffering=0) as source:
            while chunk := _read(source.fileno()):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                log.write(chunk)
                log.flush()


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # how a pseudo-terminal reports that its last writer has gone
        return b""


def _settings(environment: Mapping[str, str]) -> str:
    """Environment variables as one types them before a command."""
    return " ".join(f"{key}={value}" for key, value in environment.items())


class Demo:
    """The stages in order, in one folder.

    Args:
        out: the demo's folder; made if it is absent, refused if it is somebody else's.
        size: how much of everything.
    """

    def __init__(self, out: Path, size: Size) -> None:
        self.out, self.size = out, size
        self.run = out / "run"
        self._records = out / "stages"
        if out.is_dir() and any(out.iterdir()) and not self._records.is_dir():
            raise UserError(f"--out: {out} is not empty and no demo made it. Give another folder.")
        self._records.mkdir(parents=True, exist_ok=True)
        (out / "logs").mkdir(exist_ok=True)

    @property
    def new(self) -> bool:
        """Whether no earlier call has begun it."""
        return not any(self._records.iterdir())

    def shown(self, *parts: str) -> str:
        """A path of the demo's folder as a user at the repository's root would type it."""
        path = self.out.joinpath(*parts)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    def preparation(self) -> list[Stage]:
        """Everything before training."""
        corpus, images = self.shown("corpus"), self.shown("corpus", "images")
        tokenizer, shards = self.shown("tokenizer.safetensors"), self.shown("shards")
        number = str(self.size.images)
        return [
            Stage(
                "corpus",
                f"{number} generated images",
                ("tools/make_corpus.py", "--out", corpus, "--images", number, "--size", "128"),
                "corpus",
            ),
            Stage(
                "tokenizer",
                "a small dVAE that turns an image into a grid of visual tokens",
                (
                    *("tools/train_tokenizer.py", "--images", images, "--out", tokenizer),
                    *("--config", "configs/tokenizer_demo.yaml", *self.size.tokenizer),
                ),
                "tokenizer.safetensors",
                ("tokenizer.png", "tokenizer.run"),
                trains=True,
            ),
            Stage(
                "shards",
                "two views of every image with their tokens, written once",
                (
                    *("tools/shard_tokens.py", "--images", images, "--out", shards, "--tokenizer", tokenizer),
                    *("--views", "2", "--image-size", "112", "--patch-size", "8"),
                    *("--shard-samples", "256"),
                ),
                "shards",
            ),
            Stage("check", "every byte against the manifest", ("tools/check_shards.py", shards), "shards"),
        ]

    def pictures(self) -> Stage:
        """Loss curve and reconstructions."""
        tokenizer = self.shown("tokenizer.safetensors")
        arguments = ("tools/draw_pictures.py", self.shown("run"), "--tokenizer", tokenizer)
        return Stage("pictures", "the loss, and what the model paints into the masked patches", arguments, "run")

    def overrides(self) -> tuple[str, ...]:
        """What the training command changes in the recipe."""
        return (f"run={self.shown('run')}", f"data={self.shown('shards')}", *self.size.train)

    def launcher(self, port: int) -> list[str]:
        """What is put before a program that all ranks run."""
        launcher = Path(sys.executable).with_name("deepspeed")  # that of this virtual environment, not of PATH
        if not launcher.exists():
            raise StageError(f"{launcher} is missing. Install the package again: pip install -e .")
        options = ["--num_accelerators", str(RANKS), "--master_port", str(port), "--log_level", "warning"]
        return [str(launcher), *options]

    def training(self, port: int) -> list[str]:
        """The command that starts the run, and the same one that resumes it."""
        program = ["beit_dist/train.py", "--ds_config", "configs/deepspeed/zero1.json", "--config", RECIPE]
        return [*self.launcher(port), *program, *self.overrides()]

    def prepare(self) -> None:
        """Run what is not finished; a stage whose command changed is made anew, with all that follow."""
        stages = self.preparation()
        for index, stage in enumerate(stages):
            record = self._records / f"{stage.name}.json"
            done = json.loads(record.read_text()) if record.exists() else None
            if done is not None and done["command"] != list(stage.arguments):
                self._forget(stages[index:])
                done = None
            if done is not None and done["finished"] and (self.out / stage.output).exists():
                print(f"\n== {stage.name}: already there, skipped ({self.shown(stage.output)})", flush=True)
                continue
            record.write_text(json.dumps({"command": stage.arguments, "finished": False}))
            self.call(stage)
            record.write_text(json.dumps({"command": stage.arguments, "finished": True}))

    def _forget(self, stages: Sequence[Stage]) -> None:
        """Remove what these stages left, and the run that was made of it."""
        for stage in stages:
            for name in (stage.output, *stage.besides):
                output = self.out / name
                shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
            (self._records / f"{stage.name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.run, ignore_errors=True)

    def call(self, stage: Stage) -> None:
        """Run one of the tools, showing what it shows.

        Raises:
            StageError: it exited with another code than 0.
        """
        say(stage.name, stage.title)
        starter, environment = [sys.executable], TOOL_ENVIRONMENT
        if stage.trains:
            starter, environment = self.launcher(free_port()), RANK_ENVIRONMENT
        command, log = [*starter, *stage.arguments], self.out / "logs" / f"{stage.name}.log"
        shown = shlex.join([Path(starter[0]).name, *command[1:]])
        print(f"$ {_settings(environment)} {shown}", flush=True)
        began = time.monotonic()
        with Shown(command, log, os.environ | environment) as tool:
            if tool.wait() != 0:
                raise self._failure(shown, tool)
        print(f"-- {stage.name} took {time.monotonic() - began:.0f} s", flush=True)

    def train(self) -> None:
        """Start the run, stop it half-way by a signal to one rank, resume it, and check that no step is missing.

        Raises:
            StageError: the run failed, did not stop, or its record of steps has a gap or a repetition.
        """
        if (self.run / "DONE").exists():
            print(f"\n== train: already done, skipped ({self.shown('run')})", flush=True)
            return
        steps = self.steps()
        if not any((self.run / "checkpoints").glob("step-*/manifest.json")):
            shutil.rmtree(self.run, ignore_errors=True)  # of a call that was stopped before its first checkpoint
            say("train", f"{RANKS} ranks, {steps} steps; stopped half-way, as a scheduler would")
            self._stop_half_way(steps)
            say("resume", "the same command again goes on where it stopped")
        else:
            say("resume", "an earlier call left an unfinished run; the same command goes on with it")
        with self._start("resume") as started:
            started.wait()
        if not (self.run / "DONE").exists():  # the marker, not the launcher's exit code, tells the truth
            raise self._failure("the training command above", started)
        self._check_steps(steps)

    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        recipe = load_recipe(TrainConfig, ROOT / RECIPE, self.overrides())
        return steps_of(recipe, load_manifest(str(self.out / "shards")).samples)

    def _start(self, name: str) -> Shown:
        command = self.training(free_port())
        print(f"$ {_settings(RANK_ENVIRONMENT)} deepspeed {shlex.join(command[1:])}", flush=True)
        return Shown(command, self.out / "logs" / f"{name}.log", os.environ | RANK_ENVIRONMENT)

    def _stop_half_way(self, steps: int) -> None:
        with self._start("train") as started:
            while len(recorded := recorded_steps(self.run)) < steps // 2:
                if started.poll() is not None:
                    raise self._failure("the training command above", started)
                time.sleep(0.1)
            rank = rank_process(self.run, started)
            print(
                f"\n-- {len(recorded)} steps are recorded: SIGTERM to process {rank.pid}, one of the ranks",
                flush=True,
            )
            rank.send_signal(signal.SIGTERM)
            started.wait(STOP_SECONDS)
            if not (self.run / "PREEMPTED").exists():
                raise self._failure("the training command, asked to stop,", started)
        print(
            f"-- the run stopped with a complete checkpoint and left {self.shown('run', 'PREEMPTED')}", flush=True
        )

    def _check_steps(self, steps: int) -> None:
        recorded = recorded_steps(self.run)
        if recorded != list(range(1, steps + 1)):
            raise StageError(
                f"{self.shown('run', 'metrics.jsonl')}: got {len(recorded)} lines with steps "
                f"{recorded[:1]}..{recorded[-1:]}, expected each of 1..{steps} once"
            )
        print(f"-- done: every step of 1..{steps} is recorded exactly once, across the stop", flush=True)

    def _failure(self, what: str, process: Shown) -> StageError:
        code = process.wait(0)
        ended = "did not end in time" if code is None else f"ended with exit code {code}"
        return StageError(f"{what} {ended}. Its output is in {process.log}; the last lines:\n{process.tail(8)}")

    def conclude(self) -> None:
        """Say where everything lies and how to go on."""
        rows = [
            ("loss of every step", ("run", "pictures", "loss.png")),
            ("image, mask, guess", ("run", "pictures", "panel.png")),
            ("checkpoints", ("run", "checkpoints")),
            ("numbers of every step", ("run", "metrics.jsonl")),
            ("settings, resolved", ("run", "config.yaml")),
            ("shards", ("shards",)),
            ("tokenizer", ("tokenizer.safetensors",)),
            ("what it can draw", ("tokenizer.png",)),
            ("how it learnt to", ("tokenizer.run", "pictures")),
        ]
        print("\n== where to look")
        for what, parts in rows:
            if not self.out.joinpath(*parts).exists():
                raise StageError(f"{self.shown(*parts)} is missing, though every command succeeded")
            print(f"  {what:<22} {self.shown(*parts)}")
        print("\nThe same on your own images, step by step: README.md, 'Your own images'.", flush=True)


def say(name: str, title: str) -> None:
    """A heading between the commands' own output."""
    print(f"\n== {name}: {title}", flush=True)


def expected_minutes() -> int:
    """How long the demo takes on this machine with nothing beside it, from the speed of one core's products."""
    import torch

    torch.set_num_threads(1)
    side, times = 512, []
    a = torch.ones(side, side)
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    gigaflops = 2e-9 * side**3 / min(times)
    return math.ceil((FIXED_SECONDS + PRODUCTS / gigaflops) / 60)


def free_port() -> int:
    """A TCP port that nobody listens on now, from below the range that outgoing connections get theirs from."""
    for port in random.SystemRandom().sample(range(10000, 32000), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise StageError("no TCP port between 10000 and 32000 is free for the two ranks to meet at")


def recorded_steps(run: Path) -> list[int]:
    """The steps in a run's metrics.jsonl, in the order of its lines; a line still being written is left out."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return []
    whole = metrics.read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line)["step"] for line in whole]


def rank_process(run: Path, started: Shown) -> psutil.Process:
    """The process of the last rank, as run.json names it, if it is one that the launcher started.

    Raises:
        StageError: run.json names none of the launcher's processes.
    """
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    pid = record["ranks"][-1]["pid"]
    for process in started.descendants():
        if process.pid == pid:
            return process
    raise StageError(f"{run / 'run.json'}: got rank process {pid}, expected one that the launcher started")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python tools/demo.py\n  python tools/demo.py --out /tmp/demo --fast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder of all it makes (default: %(default)s)"
    )
    parser.add_argument("--fast", action="store_true", help="a minute's worth: all stages, nothing learnt")
    options = parser.parse_args(argv)
    start = time.monotonic()
    demo = Demo(options.out.resolve(), FAST if options.fast else FULL)
    if not options.fast and demo.new:
        minutes = max(2, expected_minutes())
        print(f"The demo takes up to {minutes} minutes on this machine, if nothing else runs here.", flush=True)
    demo.prepare()
    demo.train()
    demo.call(demo.pictures())
    demo.conclude()
    print(f"The demo took {time.monotonic() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
