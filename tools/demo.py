"""The whole system in a few minutes on two CPU cores: images, tokens, shards, a stopped and resumed run, pictures.

It runs the commands that a user types, shows each before it runs, and skips what an earlier call finished.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from beit_dist.errors import UserError, exit_cleanly

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
# One thread a rank: two ranks on two cores, and the same sums on every machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
SCRIPT = """\
== corpus: {images} generated images -> corpus/classes.json
python tools/make_corpus.py --out {out}/corpus --images {images} --size 128
== tokenizer: a small dVAE that turns an image into a grid of visual tokens -> tokenizer.run/DONE
beit tokenizer --ranks 2 --config tokenizer_demo --images {out}/corpus/images
    --out {out}/tokenizer.safetensors {dvae}
== shards: two views of every image with their tokens; one image in twenty is held out -> shards/manifest.json
beit shards --images {out}/corpus/images --out {out}/shards --tokenizer {out}/tokenizer.safetensors
    --views 2 --held-out 5% --image-size 112 --patch-size 8 --shard-samples 256
== check: every byte against the manifest
beit check {out}/shards
== train: two ranks, stopped half-way as a scheduler would -> run/checkpoints/step-*/manifest.json
beit train --ranks 2 --config demo --data {out}/shards --run {out}/run {beit}
== resume: the same command continues from the newest checkpoint -> run/DONE
beit train --ranks 2 --config demo --data {out}/shards --run {out}/run {beit}
== pictures: the curves, and what the model paints into the masked patches
beit pictures {out}/run --tokenizer {out}/tokenizer.safetensors
"""
"""The steps: a title, the file that is written last, and the command."""
FINETUNING = """\
== few: {few} other images, with labels -> few/classes.json
python tools/make_corpus.py --out {out}/few --images {few} --size 128 --seed 1
== unseen: {unseen} more, to measure on -> unseen/classes.json
python tools/make_corpus.py --out {out}/unseen --images {unseen} --size 128 --seed 2
== finetune: learn the labels, from the pre-trained weights -> finetuned/DONE
beit finetune --ranks 2 --config finetune_demo --init-from {out}/run --data {out}/few/images
    --test {out}/unseen/images --run {out}/finetuned {labels}
== scratch: the same network and recipe, from random weights -> scratch/DONE
beit finetune --ranks 2 --config finetune_demo --data {out}/few/images --test {out}/unseen/images
    --run {out}/scratch {labels}
== compare: both, over each other -> compared/loss.png
beit pictures {out}/finetuned {out}/scratch --out {out}/compared
"""
"""What --finetune adds."""
FULL = {"images": "1200", "dvae": "", "beit": "", "few": "100", "unseen": "300", "labels": ""}
FAST = {
    "images": "96",
    "dvae": "steps=20 global_batch=8 held_out=8",
    "beit": "steps=40 global_batch=32 micro_batch=16 logging.every_steps=1",
    "few": "20",
    "unseen": "20",
    "labels": "epochs=2 validation.every_steps=1 optimizer.warmup_share=0",
}
OUTPUTS = {
    "loss and its baselines": "run/pictures/loss.png",
    "image, mask, guess": "run/pictures/panel.png",
    "checkpoints": "run/checkpoints",
    "numbers of every step": "run/metrics.jsonl",
    "settings, resolved": "run/config.yaml",
    "shards": "shards",
    "held-out images": "shards/held-out",
    "tokenizer": "tokenizer.safetensors",
    "what it can draw": "tokenizer.png",
    "how it learnt to": "tokenizer.run/pictures",
    "images": "corpus/images",
}
FINETUNED = {
    "accuracy on unseen images": "compared/loss.png",
    "from pre-trained weights": "finetuned/validation.jsonl",
    "from random weights": "scratch/validation.jsonl",
}


class StepError(UserError):
    """A command of the demo failed or left something out."""

    exit_code = 1


def prepare(out: Path, script: str) -> bool:
    """Make the folder, or clear what a demo with other commands left in it; whether the demo begins anew.

    Raises:
        UserError: the folder holds something else.
    """
    record = out / "commands.txt"
    if record.exists() and record.read_text() == script:
        return False
    if out.exists() and any(out.iterdir()) and not record.exists():
        raise UserError(f"--out: {out} is not empty and no demo made it. Give another folder, or remove it.")
    for name in {Path(path).parts[0] for path in (*OUTPUTS.values(), *FINETUNED.values(), "few/", "unseen/")}:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    record.write_text(script)
    return True


def call(name: str, command: str, last: str, out: Path) -> None:
    """Run a step's command, which writes the file ``last`` at its end; ``train`` is stopped half-way.

    Raises:
        StepError: it failed, or did not write the file.
    """
    run, log, began = out / "run", out / "logs" / f"{name}.log", time.monotonic()
    if name == "train":
        shutil.rmtree(run, ignore_errors=True)  # of a call that ended before its first checkpoint
    print(f"$ {command}", flush=True)
    with started(command, log) as process:
        if name == "train":
            stop_half_way(process, run, log)
        process.wait()
    wanted = [last, "run/PREEMPTED"] if name == "train" else [last] if last else []
    missing = [path for path in wanted if not any(out.glob(path))]
    if process.returncode != 0 or missing:
        left = f" and left no {' and no '.join(missing)}" if missing else ""
        lines = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
        raise StepError(
            f"{command} ended with exit code {process.returncode}{left}. Its output is in {log}; the last lines:"
            + "".join(f"\n  | {line}" for line in lines[-8:])
        )
    print(f"-- {name} took {time.monotonic() - began:.0f} s", flush=True)


@contextmanager
def started(command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running command whose output is shown and kept in ``log``; leaving the block ends it and its children."""
    terminal = sys.stdout.isatty()
    reader, writer = pty.openpty() if terminal else os.pipe()  # tools draw progress bars on a terminal only
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, bytes(8)))
    log.write_bytes(b"")
    # A terminal's end is an error to tee, and Ctrl-C must not end it before the command.
    tee = subprocess.Popen(["tee", "-i", log], stdin=reader, stderr=subprocess.DEVNULL)
    environment = os.environ | ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    process = subprocess.Popen(shlex.split(command), cwd=ROOT, env=environment, stdout=writer, stderr=writer)
    os.close(reader)
    os.close(writer)
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.terminate()
            for member in psutil.wait_procs(family, timeout=30)[1]:
                member.kill()
        with suppress(subprocess.TimeoutExpired):
            tee.wait(timeout=10)  # not for ever: an orphan may hold the other end


def stop_half_way(process: subprocess.Popen[bytes], run: Path, log: Path) -> None:
    """Send SIGTERM to one rank, as schedulers do, once half of the steps are shown, and wait for the run's end.

    Raises:
        StepError: it does not end, or ``run.json`` names a process that is none of its own.
    """
    step, last = 0, 1
    while 2 * step < last:
        if process.poll() is not None:
            return
        time.sleep(0.1)
        for found in re.finditer(r"\bstep (\d+)/(\d+)", log.read_text(errors="replace")):
            step, last = int(found[1]), int(found[2])
    pid = json.loads((run / "run.json").read_text())["ranks"][-1]["pid"]
    if pid not in [child.pid for child in psutil.Process(process.pid).children(recursive=True)]:
        raise StepError(f"{run / 'run.json'}: got rank process {pid}, expected one that the command started")
    print(f"\n-- after step {step} of {last}: SIGTERM to process {pid}, one of the ranks", flush=True)
    os.kill(pid, signal.SIGTERM)
    try:
        process.wait(timeout=180)  # a save takes a second or two here
    except subprocess.TimeoutExpired:
        raise StepError(f"the run did not stop within 180 s. Its output is in {log}.") from None
    print("-- the run stopped with a whole checkpoint", flush=True)


def check_steps(run: Path) -> None:
    """Raise StepError unless the run's record has every step once."""
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((run / "DONE").read_text())["step"]
    if steps != list(range(1, last + 1)):
        raise StepError(f"{run / 'metrics.jsonl'}: got {len(steps)} lines, expected each step of 1..{last} once")
    print(f"-- every step of 1..{last} is recorded exactly once, across the stop", flush=True)


def compare(out: Path) -> None:
    """Say what both fine-tunings came to on images that neither has seen, and what answering blindly comes to."""
    results = {}
    for name in ("finetuned", "scratch"):
        results[name] = json.loads((out / name / "validation.jsonl").read_text().splitlines()[-1])
    baselines = json.loads((out / "finetuned" / "run.json").read_text())["baselines"]["held_out"]["accuracy"]
    ((baseline, blind),) = baselines.items()
    images = results["finetuned"]["images"]
    after, without = (results[name]["accuracy"] for name in ("finetuned", "scratch"))
    error = max(math.sqrt(share * (1 - share) / images) for share in (after, without))
    print(
        f"-- of {images} unseen images, {after:.1%} are right after pre-training, {without:.1%} without it, and "
        f"{blind:.1%} by always answering the {baseline} (each ± {error:.1%}, the standard error)",
        flush=True,
    )


def expected_minutes() -> int:
    """How long the demo takes on two free cores, from the speed of one matrix product."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.ones(512, 512)
    seconds = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5))
    return max(2, math.ceil((20 + 63_500 * seconds) / 60))  # measured: 320 s where a product takes 4.7 ms


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python tools/demo.py\n  python tools/demo.py --out /tmp/demo --fast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="demo", help="folder of all it makes (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="a minute's worth: all steps, nothing learnt")
    parser.add_argument("--finetune", action="store_true", help="then learn classes from 100 labels, twice")
    options = parser.parse_args(argv)
    begin, out = time.monotonic(), options.out.resolve()
    at = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    settings = {"out": shlex.quote(str(at)), **(FAST if options.fast else FULL)}
    script = SCRIPT.format(**settings)
    if prepare(out, script) and not options.fast:
        print(f"The demo takes up to {expected_minutes()} minutes on this machine, if nothing else runs here.")
    print("\n$ export", *(f"{key}={value}" for key, value in ENVIRONMENT.items()))
    steps = script + (FINETUNING.format(**settings) if options.finetune else "")
    for step in f"\n{steps}".split("\n== ")[1:]:
        heading, command = step.rstrip().replace("\n    ", " ").split("\n")
        title, _, last = heading.partition(" -> ")
        name = title.partition(":")[0]
        print(f"\n== {title}", flush=True)
        if last and any(out.glob(last)):
            print("already there, skipped", flush=True)
        else:
            call(name, command.rstrip(), last, out)
        if name == "resume":
            check_steps(out / "run")
        if name == "compare":
            compare(out)
    print("\n== where to look")
    for what, path in {**OUTPUTS, **(FINETUNED if options.finetune else {})}.items():
        if not (out / path).exists():
            raise StepError(f"{at / path} is missing, though every command succeeded. Remove {at}, and try again.")
        print(f"  {what:<25} {at / path}")
    print("\nThe same on your own images, step by step: README.md, 'Your own images'.")
    print(f"The demo took {time.monotonic() - begin:.0f} s.")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
