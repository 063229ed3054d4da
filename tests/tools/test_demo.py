"""The demo's logic, small programs in the place of the real commands: what it runs, skips, stops, refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

TOOL = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else None
print("tool", *sys.argv[1:])
if out is not None and out.suffix:
    out.write_text("weights")
    out.with_suffix(".png").write_text("picture")
    out.with_suffix(".run").joinpath("pictures").mkdir(parents=True)
elif out is not None:
    out.mkdir(exist_ok=True)
if "draw_pictures" in sys.argv[0]:
    for name in ("loss.png", "panel.png"):
        (pathlib.Path(sys.argv[1]) / "pictures" / name).write_text("picture")
"""

# A launcher with one rank beside it: a line of metrics every few milliseconds, stopped by SIGTERM to the rank.
LAUNCHER = """
import json, os, pathlib, signal, subprocess, sys, time
run = pathlib.Path([a for a in sys.argv if a.startswith("run=")][0][4:])
steps, fault = int(sys.argv[1]), sys.argv[2]
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "pictures").mkdir(exist_ok=True)
if "--rank" not in sys.argv:
    sys.exit(subprocess.call([sys.executable, *sys.argv, "--rank"]))
if fault == "dies":
    sys.exit("no such recipe")
(run / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": "here", "pid": os.getpid()}]}))
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
        time.sleep(0.02)
        while position == 30 and fresh and not stop:  # until it is told to stop, however late
            time.sleep(0.02)
saved.parent.mkdir(exist_ok=True)
saved.write_text(str(position))
(run / ("DONE" if position == steps else "PREEMPTED")).write_text("{}")
"""


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tools/demo.py`` with a repository of stand-ins; ``demo.fault`` says what goes wrong in training."""
    spec = importlib.util.spec_from_file_location("demo_under_test", REPOSITORY / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    root = tmp_path / "repository"
    (root / "tools").mkdir(parents=True)
    for name in ("make_corpus", "train_tokenizer", "shard_tokens", "check_shards", "draw_pictures"):
        (root / "tools" / f"{name}.py").write_text(TOOL)
    (root / "launcher.py").write_text(LAUNCHER)
    module.fault = "none"  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module.Demo, "steps", lambda self: 40)
    monkeypatch.setattr(module.Demo, "launcher", lambda self, port: [sys.executable])
    monkeypatch.setattr(
        module.Demo,
        "training",
        lambda self, port: [sys.executable, "launcher.py", "40", module.fault, *self.overrides()],
    )
    return module


def call(demo: ModuleType, out: Path, *more: str) -> None:
    """Run the demo as the command line would."""
    assert demo.main(["--out", str(out), *more]) == 0


def test_the_run_is_stopped_half_way_and_resumed_and_no_step_is_missing(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    shown = capfdbinary.readouterr().out.decode()
    order = ["== corpus", "== tokenizer", "== shards", "== check", "== train", "SIGTERM", "PREEMPTED", "== resume"]
    places = [shown.index(text) for text in [*order, "exactly once", "== pictures", "== where to look"]]
    assert places == sorted(places)
    assert "$ OMP_NUM_THREADS=1 python tools/make_corpus.py --out" in shown
    assert "tool --images" in shown, "the output of the tools goes through"
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
    for name in ("corpus", "tokenizer", "shards", "check"):
        assert f"== {name}: already there, skipped" in shown
    assert "== train: already done, skipped" in shown
    assert (out / "run" / "pictures" / "loss.png").exists()


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


def test_an_unfinished_run_is_gone_on_with(
    demo: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out = tmp_path / "demo"
    call(demo, out)
    (out / "run" / "DONE").unlink()
    capfdbinary.readouterr()
    call(demo, out)
    shown = capfdbinary.readouterr().out.decode()
    assert "an earlier call left an unfinished run" in shown
    assert "SIGTERM" not in shown


def test_a_failing_stage_is_named_with_its_command_code_and_last_lines(demo: ModuleType, tmp_path: Path) -> None:
    (demo.ROOT / "tools" / "shard_tokens.py").write_text("import sys\nprint('disk full')\nsys.exit(7)\n")
    with pytest.raises(demo.StageError, match=r"python tools/shard_tokens\.py .* exit code 7[^|]*\| disk full"):
        call(demo, tmp_path / "demo")
    (demo.ROOT / "tools" / "shard_tokens.py").write_text(TOOL)
    call(demo, tmp_path / "demo")


def test_a_failing_run_is_named_with_its_last_lines(demo: ModuleType, tmp_path: Path) -> None:
    demo.fault = "dies"  # type: ignore[attr-defined]
    with pytest.raises(
        demo.StageError, match=r"training command above ended with exit code 1[^|]*\| no such recipe"
    ):
        call(demo, tmp_path / "demo")


def test_a_missing_step_is_found(demo: ModuleType, tmp_path: Path) -> None:
    demo.fault = "loses a step"  # type: ignore[attr-defined]
    with pytest.raises(demo.StageError, match=r"got 39 lines .* expected each of 1\.\.40 once"):
        call(demo, tmp_path / "demo")


def test_a_folder_of_somebody_else_is_refused(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(demo.UserError, match="not empty and no demo made it"):
        call(demo, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_only_a_process_of_the_launcher_is_ever_signalled(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": "here", "pid": 1}]}))
    (tmp_path / "log").mkdir()
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with demo.Shown(sleeper, tmp_path / "log" / "x") as started, pytest.raises(demo.StageError, match="process 1"):
        demo.rank_process(tmp_path, started)
    assert started.poll() is not None, "leaving the block ends the command"
