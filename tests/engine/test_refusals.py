"""A start that is refused leaves everything as it was, says why once, and ``--dry-run`` says the same."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.fork_server import environment_of
from support.forked import Forked
from support.ports import free_ports
from support.runs import Run, wait

from beit_dist.commands.train import main
from beit_dist.engine import refusal
from beit_dist.engine.checkpoint.attempts import Attempts, SupersededError
from beit_dist.engine.ranks.distributed import Agreement, Ranks
from beit_dist.engine.refusal import REFUSED, RefusedError, check_space, on_rank_0, say_refusal
from beit_dist.errors import CheckpointError, ConfigError, DataError, SpaceError, UserError
from beit_dist.storage.local import LocalPlace

OLD = Path(__file__).parent / "old_runs"
OF_A_NEW_RUN = {
    "warm-up": (
        ["optimizer.warmup_steps=1000"],
        "optimizer.warmup_steps: got 1000, expected a warm-up shorter than the 46 steps that epochs gives",
    ),
    "batch": (["global_batch=160"], "global_batch: got 160, expected at most the 147 images"),
    "address": (
        ["logging.metrics_port=0", "logging.metrics_address=192.0.2.1"],
        "logging.metrics_address: got '192.0.2.1', expected an address of this host",
    ),
    "weights": (["init_from=runs/nothing"], "init_from: got runs/nothing, which does not exist, expected a run"),
}


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, markers and empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def start_ranks(run: Run, **environment: str) -> tuple[list[int], str]:
    """Start two ranks without anything that ends them; their exit codes, and all that they print."""
    (port,) = free_ports(1)
    processes = [
        Forked(run.words(), os.environ | environment_of(rank, 2, port) | environment, run.folder.parent)
        for rank in range(2)
    ]
    ends = [wait(process) for process in processes]
    return [code for code, _ in ends], "".join(output for _, output in ends)


def dry_run(run: Run) -> str:
    with pytest.raises(UserError) as refused:
        main([*run.command()[2:], "--dry-run", "--ranks", "2"])
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.mark.parametrize("name", OF_A_NEW_RUN)
def test_a_dry_run_refuses_what_a_start_does(new_run: Callable[..., Run], name: str) -> None:
    settings, said = OF_A_NEW_RUN[name]
    assert said in dry_run(new_run("run", overrides=["loader.workers=0", *settings]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_NEW_RUN)
def test_a_new_run_that_is_refused_leaves_no_folder(new_run: Callable[..., Run], name: str) -> None:
    settings, _ = OF_A_NEW_RUN[name]
    run = new_run("runs/run", overrides=["loader.workers=0", *settings])
    run.folder.parent.mkdir()
    said = dry_run(run)
    codes, output = start_ranks(run, **{REFUSED: str(run.folder.parents[1] / "refused")})
    assert codes == [2, 2], output
    assert output.count(f"error: {said}\n") == output.count("error:") == 1, output
    assert "Traceback" not in output
    assert not list(run.folder.parent.iterdir())
    assert (run.folder.parents[1] / "refused").exists()  # for what cannot see the exit code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["masking.mode=random"], "masking.mode was 'exact', now 'random'"),
        ([], "Set data to the shards that the run began with"),
    ],
    ids=["settings", "data set"],
)
def test_another_run_s_folder_stays_as_it_was(
    new_run: Callable[..., Run], make_shards: Callable[..., Any], tmp_path: Path, settings: list[str], said: str
) -> None:
    make_shards(tmp_path / "other", [20, 13], views=2, image_size=16, patch_size=4, vocabulary=16)
    model = "model={size: tiny, width: 16, depth: 2, heads: 2, image_size: 16, patch_size: 4, vocabulary: 16, "
    run = new_run("run", overrides=[model + "drop_path: 0.2}", "masking.min_block=2", *settings])
    run.data = tmp_path / "other"
    shutil.copytree(OLD / "first", run.folder)
    (run.folder / "FAILED").write_text("of an earlier start\n")
    before = content(run.folder)
    codes, output = start_ranks(run)
    assert codes == [2, 2], output
    assert said in output
    assert output.count("error:") == 1, output
    assert content(run.folder) == before


def test_what_rank_0_finds_all_ranks_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> None:
        raise CheckpointError("another run")

    first, second = (Agreement(Ranks(rank, 1, 0), None) for rank in (0, 1))  # type: ignore[arg-type]
    told: list[Any] = []
    monkeypatch.setattr(first, "from_rank_0", lambda value: told.append(value) or value)
    monkeypatch.setattr(second, "from_rank_0", lambda _: told[0])
    with pytest.raises(CheckpointError, match="another run"):
        on_rank_0(first, found)
    with pytest.raises(RefusedError, match="another run") as refused:
        on_rank_0(second, lambda: pytest.fail("it is rank 0 that looks"))
    assert refused.value.exit_code == 2


def test_what_all_ranks_find_one_says_and_what_one_finds_it_says_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in __all__
    monkeypatch.setattr(refusal, "store_of_ranks", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    others = [threading.Thread(target=say_refusal, args=(DataError("no images"), Ranks(1, 2, 1)))]
    others[0].start()
    say_refusal(DataError("no images"), Ranks(0, 2, 0))
    others[0].join(30)
    assert capsys.readouterr().err == "error: no images\n"
    monkeypatch.setattr(refusal, "_PATIENCE", 0.1)
    store = dist.HashStore()  # type: ignore[attr-defined]
    say_refusal(DataError("no disk"), Ranks(1, 2, 1))
    assert capsys.readouterr().err == f"error: rank 1 on {socket.gethostname()}: no disk\n"


def test_a_start_that_was_overtaken_while_it_looked_gives_way(tmp_path: Path) -> None:
    seen = Attempts(LocalPlace(tmp_path)).newest()
    Attempts(LocalPlace(tmp_path)).begin(seen)
    slower = Attempts(LocalPlace(tmp_path))
    with pytest.raises(SupersededError, match="superseded by attempt 1, which began in the meantime"):
        slower.begin(seen)
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["000001"]
    slower.begin(1)
    assert slower.number == 2


def test_a_disk_without_room_is_found_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    check_space(tmp_path / "runs" / "run", 1, 3)
    with pytest.raises(SpaceError, match="GiB for 3 checkpoints and the one being written"):
        check_space(tmp_path / "runs" / "run", 2**60, 3)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "field"),
    [("run=https://example.org/run", "run"), ("storage.options={s3a: {anon: true}}", "storage.options.s3a")],
)
def test_storage_that_cannot_be_is_refused_with_the_recipe(
    new_run: Callable[..., Run], setting: str, field: str
) -> None:
    with pytest.raises(ConfigError, match=field) as refused:
        main([*new_run("run").command()[2:], setting, "--dry-run"])
    assert refused.value.field == field
