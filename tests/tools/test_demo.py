"""The demo's logic, small programs in the place of the real commands: what it runs, skips, stops, refuses."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

CORPUS = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
print("tool", *sys.argv[1:])
(out / "images").mkdir(parents=True)
(out / "classes.json").write_text("{}")
"""

# The command line: training is a child, as with --ranks 2.
BEIT = """
import pathlib, subprocess, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else None
print("tool", *sys.argv[1:], flush=True)
command = sys.argv[1]
if command == "tokenizer":
    out.write_text("weights")
    out.with_suffix(".png").write_text("picture")
    out.with_suffix(".run").joinpath("pictures").mkdir(parents=True)
    out.with_suffix(".run").joinpath("DONE").write_text("{}")
if command == "shards":
    (out / "held-out").mkdir(parents=True)
    (out / "manifest.json").write_text("{}")
if command == "finetune":
    run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
    run.mkdir()
    right = 0.36 if "--init-from" in sys.argv else 0.2
    line = '{"accuracy": %s, "images": %s}\\n'
    (run / "validation.jsonl").write_text(line % (0.1, 9) + line % (right, 400))
    (run / "run.json").write_text('{"baselines": {"held_out": {"accuracy": {"commonest class": 0.1}}}}')
    (run / "DONE").write_text("{}")
if command == "train":
    sys.exit(subprocess.call([sys.executable, "train.py", *sys.argv[2:]]))
if command == "pictures" and out:
    (out / "loss.png").parent.mkdir()
    (out / "loss.png").write_text("picture")
elif command == "pictures":
    for name in ("loss.png", "panel.png"):
        (pathlib.Path(sys.argv[2]) / "pictures" / name).write_text("picture")
"""

# Training by one rank: a line of metrics every few milliseconds, stopped by SIGTERM.
TRAIN = """
import json, os, pathlib, signal, sys, time
fault, steps = pathlib.Path("fault").read_text(), 40
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "pictures").mkdir(exist_ok=True)
if fault == "dies":
    sys.exit("no such recipe")
pid = os.getppid() if fault == "names another process" else os.getpid()
(run / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": "here", "pid": pid}]}))
(run / "config.yaml").write_text("resolved")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
saved = run / "checkpoints" / "step-1.a1" / "manifest.json"
fresh = not saved.exists()
position = 0 if fresh else int(saved.read_text())
for marker in ("PREEMPTED", "DONE"):
    (run / marker).unlink(missing_ok=True)
with open(run / "metrics.jsonl", "a") as metrics:
    while position < steps and not stop:
        position += 1
        if not (fault == "loses a step" and position == steps):
            print(json.dumps({"step": position}), file=metrics, flush=True)
        print(f"step {position}/{steps}  loss 1", flush=True)
        time.sleep(0.02)
        while position == 30 and fresh and not stop and fault != "does not stop":  # however late
            time.sleep(0.02)
        if fault == "does not stop":
            stop.clear()
saved.parent.mkdir(exist_ok=True)
saved.write_text(str(position))
(run / ("DONE" if position == steps else "PREEMPTED")).write_text(json.dumps({"step": position}))
"""


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tools/demo.py`` with a repository of stand-ins; its file ``fault`` says what goes wrong in training."""
    spec = importlib.util.spec_from_file_location("demo_under_test", REPOSITORY / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    root = tmp_path / "repository"
    program(root / "tools" / "make_corpus.py", CORPUS)
    program(root / "train.py", TRAIN)
    program(root / "bin" / "beit", BEIT)
    (root / "bin" / "python").symlink_to(sys.executable)
    (root / "fault").write_text("none")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "BIN", root / "bin")
    monkeypatch.setattr(module, "expected_minutes", lambda: 3)
    return module


def program(path: Path, text: str) -> None:
    """Write an executable Python program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def call(demo: ModuleType, out: Path, *more: str) -> None:
    """Run the demo as the command line would."""
    assert demo.main(["--out", str(out), *more]) == 0


def test_the_run_is_stopped_half_way_and_resumed_and_no_step_is_missing(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    shown = capfdbinary.readouterr().out.decode()
    assert shown.startswith("The demo takes up to 3 minutes")
    order = ["== corpus", "== tokenizer", "== shards", "== check", "== train", "SIGTERM", "== resume"]
    places = [shown.index(text) for text in [*order, "exactly once", "== pictures", "== where to look"]]
    assert places == sorted(places)
    assert "$ export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu\n" in shown
    assert "$ python tools/make_corpus.py --out" in shown
    assert "tool shards --images" in shown, "the output of the tools goes through"
    steps = [json.loads(line)["step"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_a_second_call_skips_what_is_there_and_draws_again(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    capfdbinary.readouterr()
    (out / "run" / "pictures" / "loss.png").unlink()
    call(demo, out)
    shown = capfdbinary.readouterr().out.decode()
    headings = ["corpus", "tokenizer", "shards", "check", "train", "resume", "pictures"]
    parts = dict(zip(headings, re.split(r"\n== ", shown)[1:-1], strict=True))
    skipped = [name for name, part in parts.items() if "already there, skipped" in part and "$" not in part]
    assert skipped == ["corpus", "tokenizer", "shards", "train", "resume"]
    assert "The demo takes up to" not in shown
    assert (out / "run" / "pictures" / "loss.png").exists()


def test_with_finetune_both_starts_are_compared_and_the_demo_itself_is_not_repeated(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    capfdbinary.readouterr()
    call(demo, out, "--finetune")
    shown = capfdbinary.readouterr().out.decode()
    assert "$ beit train" not in shown
    assert shown.count("$ beit finetune") == 2
    said = (
        "36.0% are right after pre-training, 20.0% without it, and 10.0% by always answering the commonest class"
    )
    assert f"-- of 400 unseen images, {said} (each ± 2.4%, the standard error)" in shown
    assert str(out / "compared" / "loss.png") in shown
    call(demo, out, "--finetune")
    assert "$ beit finetune" not in capfdbinary.readouterr().out.decode()


def test_another_size_makes_everything_anew(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    left = [out / folder / "of the first call" for folder in ("corpus", "tokenizer.run")]
    for path in left:
        path.write_text("")
    capfdbinary.readouterr()
    call(demo, out, "--fast")
    assert b"skipped" not in capfdbinary.readouterr().out
    assert not any(path.exists() for path in left)


def test_an_unfinished_run_is_resumed_and_not_stopped_again(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    (out / "run" / "DONE").unlink()
    capfdbinary.readouterr()
    call(demo, out)
    shown = capfdbinary.readouterr().out.decode()
    assert "$ beit train" in shown[shown.index("== resume") :]
    assert "SIGTERM" not in shown


def test_a_failing_stage_is_named_with_its_command_code_and_last_lines(demo: ModuleType, tmp_path: Path) -> None:
    first = 'if command == "tokenizer":'
    failing = "if command == 'shards':\n    print('disk full')\n    sys.exit(7)\n"
    program(demo.ROOT / "bin" / "beit", BEIT.replace(first, failing + first))
    with pytest.raises(demo.StepError, match=r"beit shards .* exit code 7[^|]*(\|.*\n +)*\| disk full"):
        call(demo, tmp_path / "demo")
    program(demo.ROOT / "bin" / "beit", BEIT)
    call(demo, tmp_path / "demo")  # and the next call begins with it


def test_a_failing_run_is_named_with_its_last_lines(demo: ModuleType, tmp_path: Path) -> None:
    (demo.ROOT / "fault").write_text("dies")
    with pytest.raises(demo.StepError, match=r"beit train .* exit code 1[^|]*(\|.*\n +)*\| no such recipe"):
        call(demo, tmp_path / "demo")


def test_a_run_that_does_not_stop_when_asked_is_an_error(demo: ModuleType, tmp_path: Path) -> None:
    (demo.ROOT / "fault").write_text("does not stop")
    with pytest.raises(demo.StepError, match="left no run/PREEMPTED"):
        call(demo, tmp_path / "demo")


def test_a_command_that_leaves_nothing_is_an_error(demo: ModuleType, tmp_path: Path) -> None:
    program(demo.ROOT / "bin" / "beit", BEIT.replace('command == "shards"', "False"))
    with pytest.raises(demo.StepError, match=r"exit code 0 and left no shards/manifest\.json"):
        call(demo, tmp_path / "demo")


def test_a_missing_step_is_found(demo: ModuleType, tmp_path: Path) -> None:
    (demo.ROOT / "fault").write_text("loses a step")
    with pytest.raises(demo.StepError, match=r"got 39 lines, expected each step of 1\.\.40 once"):
        call(demo, tmp_path / "demo")


def test_a_folder_may_have_any_name(demo: ModuleType, tmp_path: Path) -> None:
    call(demo, tmp_path / "PORT == a folder's")


def test_a_folder_of_somebody_else_is_refused(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(demo.UserError, match="not empty and no demo made it"):
        call(demo, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_only_a_process_of_the_command_is_ever_signalled(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (demo.ROOT / "fault").write_text("names another process")
    with pytest.raises(demo.StepError, match=r"got rank process \d+, expected one that the command started"):
        call(demo, tmp_path / "demo")
    assert b"SIGTERM" not in capfdbinary.readouterr().out


def test_an_error_or_ctrl_c_ends_the_command_and_its_children(demo: ModuleType, tmp_path: Path) -> None:
    program(tmp_path / "sleep.py", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    starting = f"import subprocess, sys; subprocess.call([sys.executable, {str(tmp_path / 'sleep.py')!r}])"
    log = tmp_path / "log"
    with suppress(KeyboardInterrupt), demo.started(f"python -c {shlex.quote(starting)}", log) as process:
        while not log.read_text().strip():
            assert process.poll() is None
        raise KeyboardInterrupt
    assert process.poll() is not None
    assert not psutil.pid_exists(int(log.read_text()))


def test_on_a_terminal_commands_see_one_of_its_width(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 20, 72, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        program(tmp_path / "width.py", "import os\nprint('columns', os.get_terminal_size(1).columns)")
        with demo.started(f"python {tmp_path / 'width.py'}", tmp_path / "log") as process:
            process.wait()
        monkeypatch.undo()
    os.close(ours)
    assert (tmp_path / "log").read_text().strip() == "columns 72"
