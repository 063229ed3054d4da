"""The script that runs in each pod of the training Job, with stand-ins for Python and the launcher."""

from __future__ import annotations

import http.server
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.kustomize import KUBERNETES, render

BASE = KUBERNETES / "base"
ENTRY = BASE / "entry.sh"


# python: the dry run gives $DRY_RUN; the launcher notes its arguments and ends as $BEHAVIOUR says.
PYTHON = """#!/usr/bin/env bash
if [[ " $* " == *" --dry-run "* ]]; then echo "$*" > dry-run.called; exit "${DRY_RUN:-0}"; fi
printf '%s\\n' "$@" > launcher.called
case $BEHAVIOUR in
  done) touch run/DONE ;;
  done-later) (sleep 0.5; touch run/DONE) >/dev/null 2>&1 & ;;
  stopped) touch run/PREEMPTED; exit 1 ;;
  stopped-cleanly) touch run/PREEMPTED ;;
  wrong) printf '{\\n "rank": 3,\\n "exit_code": 2,\\n "error": ""\\n}' > run/FAILED; exit 1 ;;
  crashes) printf '{\\n "rank": 3,\\n "exit_code": 1,\\n "error": ""\\n}' > run/FAILED; exit 1 ;;
  dies) exit 1 ;;
  stays) # its rank has ended; it waits for launchers that are gone, and hears no signal
    trap '' TERM
    sleep 1.5 & wait
    touch run/PREEMPTED
    mkfifo pipe
    read -rt 300 _ <>pipe ;;
  refused) touch "$BEIT_DIST_REFUSED"; exit 1 ;;
  waits)
    trap 'touch run/PREEMPTED; exit 1' TERM
    touch ready
    for _ in $(seq 600); do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def entry(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with stand-ins for ``python`` and ``getent``, and the pod's variables for it."""
    (tmp_path / "run").mkdir()
    for name, text in (("python", PYTHON), ("getent", "#!/bin/sh\nexit 0\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "RUN": "run",
        "JOB_COMPLETION_INDEX": "0",
        "MARKER_SECONDS": "3",
        "TMPDIR": str(tmp_path),
    }
    return tmp_path, render("base").training.environment | settings


def run_entry(entry: tuple[Path, dict[str, str]], behaviour: str, **settings: str) -> int:
    """The exit code that the Job sees."""
    folder, variables = entry
    variables = variables | {"BEHAVIOUR": behaviour} | settings
    command = ["bash", str(ENTRY), "--config=r.yaml", "run=run"]
    return subprocess.run(command, cwd=folder, env=variables, timeout=60, check=False).returncode


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("done", 0),
        ("done-later", 0),
        ("stopped", 75),
        ("stopped-cleanly", 75),  # with 0 the Job would never start this index again
        ("wrong", 2),
        ("refused", 2),
        ("crashes", 1),
        ("dies", 1),
        ("nothing", 1),
    ],
)
def test_the_exit_code_tells_how_the_run_ended(
    entry: tuple[Path, dict[str, str]], behaviour: str, code: int
) -> None:
    assert run_entry(entry, behaviour) == code


@pytest.mark.parametrize("marker", ["DONE", "PREEMPTED", "FAILED"])
def test_a_marker_of_the_last_start_does_not_hide_a_crash(entry: tuple[Path, dict[str, str]], marker: str) -> None:
    (entry[0] / "run" / marker).write_text(json.dumps({"exit_code": 2}))
    assert run_entry(entry, "dies") == 1


def test_a_refused_start_does_not_hide_how_the_next_one_ends(entry: tuple[Path, dict[str, str]]) -> None:
    assert run_entry(entry, "refused") == 2
    assert run_entry(entry, "dies") == 1


def test_wrong_settings_end_the_pod_before_the_launcher_starts(entry: tuple[Path, dict[str, str]]) -> None:
    assert run_entry(entry, "done", DRY_RUN="2") == 2
    assert not (entry[0] / "launcher.called").exists()
    assert "--ranks 16" in (entry[0] / "dry-run.called").read_text()


def test_each_pod_starts_its_ranks_under_its_own_index(entry: tuple[Path, dict[str, str]]) -> None:
    assert run_entry(entry, "done", JOB_COMPLETION_INDEX="1") == 0
    arguments = (entry[0] / "launcher.called").read_text().splitlines()
    given = dict(itertools.pairwise(arguments))
    assert given["--node-rank"] == "1"
    assert given["--nnodes"] == "2"
    assert given["--nproc-per-node"] == "8"
    assert given["--master-addr"] == "beit-pretrain-0.beit-pretrain"
    assert arguments[-4:] == ["-m", "beit_dist.train", "--config=r.yaml", "run=run"]


def test_torchrun_knows_the_options_that_the_entry_gives_it() -> None:
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    text = ENTRY.read_text()
    launcher = text[text.index("torch.distributed.run") : text.index('-m "$MODULE" "$@" &')]
    assert {word for word in launcher.split() if word.startswith("--")} <= known


def test_a_launcher_whose_ranks_have_ended_does_not_wait_for_those_of_pods_that_are_gone(
    entry: tuple[Path, dict[str, str]],
) -> None:
    assert run_entry(entry, "stays", LEAVE_SECONDS="0") == 75  # by itself it takes longer than this waits


def test_the_pods_stop_signal_reaches_the_ranks(entry: tuple[Path, dict[str, str]]) -> None:
    folder, variables = entry
    process = subprocess.Popen(["bash", str(ENTRY)], cwd=folder, env=variables | {"BEHAVIOUR": "waits"})
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 75


@pytest.fixture
def health() -> Iterator[tuple[int, list[int]]]:
    """The port of a server whose ``/healthz`` gives the last status of a list, and all else a failure."""
    statuses = [200]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[-1] if self.path == "/healthz" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, statuses
    server.shutdown()
    server.server_close()


def healthy(port: int, index: str) -> bool:
    """What the probe says of a pod."""
    command = ["bash", str(BASE / "healthy.sh"), str(port)]
    environment = {"PATH": "/usr/bin:/bin", "JOB_COMPLETION_INDEX": index}
    return not subprocess.run(
        command, env=environment, timeout=30, check=False, stderr=subprocess.DEVNULL
    ).returncode


def test_rank_0s_pod_is_healthy_while_its_exporter_says_so(health: tuple[int, list[int]]) -> None:
    port, statuses = health
    assert healthy(port, "0")
    statuses.append(503)
    assert not healthy(port, "0")
    assert healthy(port, "1"), "it serves no metrics"


def test_rank_0s_pod_is_not_ready_before_it_serves_metrics(health: tuple[int, list[int]]) -> None:
    assert not healthy(1, "0")
