"""The study: its trials are commands, run once each whatever is stopped, and the page says what they came to."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import study.jobs
from beit_dist.commands.main import COMMANDS
from beit_dist.commands.training import parse
from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.config.run import RunConfig
from beit_dist.config.tokenizer import TokenizerConfig
from study.jobs import Jobs, spent
from study.lists import part, write_lists
from study.outcomes import differences, unlike
from study.page import write_page
from study.places import Places
from study.spreads import Spread, gain, verdict
from study.trials import AT_THE_END, FIRST, PART_SECONDS, Seeds, Trial, chosen, parts
from study.trials import study as all_trials

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "evidence.py"
TRIALS = all_trials(Seeds())
SCHEMAS: dict[str, type[RunConfig]] = {
    "tokenizer": TokenizerConfig,
    "train": PretrainingConfig,
    "finetune": FinetuningConfig,
}


# ------------------------------------------------------------------------------------------ the trials


def test_every_trial_is_a_command_that_beit_takes() -> None:
    places = Places(Path("work"), Path("data"), ROOT / "configs" / "evidence")
    for trial in TRIALS:
        command, *words = places.words(trial)
        parser = importlib.import_module(COMMANDS[command]).parser()
        if command not in SCHEMAS:
            parser.parse(words)
            continue
        args = parse(parser, words)
        config = load_recipe(SCHEMAS[command], Path(args.config), args.overrides, flags={"run": "run"})
        seed = next((word for word in words if word.startswith("seed=")), "seed=0")
        assert config.seed == int(seed.removeprefix("seed="))


def test_trials_that_are_compared_differ_in_what_is_compared_only() -> None:
    def words(name: str) -> list[str]:
        found = next(trial for trial in TRIALS if trial.name == name)
        return [word for word in found.words if not word.startswith("init_from")]

    assert words("finetune/tokens-blocks/10/0-2") == words("finetune/tokens-blocks/10/1-2")
    differ = set(words("finetune/scratch/10/2")) ^ set(words("finetune/tokens-blocks/10/0-2"))
    assert differ == set(FIRST["scratch"]) ^ set(FIRST["pre-trained"])
    more = set(words("finetune/scratch-4x/10/2")) ^ set(words("finetune/scratch/10/2"))
    assert more == {"epochs=30", "epochs=120"}
    pixels = set(words("pretrain/pixels-blocks/1")) ^ set(words("pretrain/tokens-blocks/1"))
    assert pixels == {"model.target=pixels"}


FITTED = {"{work}/lists/fit-10.csv", "{work}/lists/fit-100.csv"}


def test_nothing_is_chosen_by_the_test_images() -> None:
    choices = [trial for trial in TRIALS if trial.name.startswith("choose/") and "--test" in trial.words]
    assert not [trial for trial in TRIALS if trial.words[0] == "train" and "test" in " ".join(trial.words)]
    assert {trial.words[trial.words.index("--test") + 1] for trial in choices} == {"{work}/lists/choose.csv"}
    assert {trial.words[trial.words.index("--data") + 1] for trial in choices} == FITTED
    during = [trial for trial in TRIALS if trial.words[0] == "finetune" and AT_THE_END[0] not in trial.words]
    assert not during, "these would measure the test images while they train"


def test_names_are_unlike_and_what_a_trial_needs_comes_before_it() -> None:
    seen: set[str] = set()
    for trial in TRIALS:
        assert trial.name not in seen
        assert set(trial.needs) <= seen, trial.name
        seen.add(trial.name)


def test_parts_hold_all_trials_in_their_order_within_two_hours_of_two_cores() -> None:
    cut = parts(TRIALS)
    assert [trial for each in cut for trial in each] == TRIALS
    assert all(sum(trial.seconds for trial in each) <= PART_SECONDS for each in cut)
    assert all(len({trial.extra for trial in each}) == 1 for each in cut)


def test_what_a_trial_needs_is_run_with_it() -> None:
    wanted = [trial for trial in TRIALS if trial.name == "finetune/tokens-blocks/10/1-0"]
    names = [trial.name for trial in chosen(TRIALS, wanted)]
    assert names == ["tokenizer/good", "shards/good-8", "pretrain/tokens-blocks/1", wanted[0].name]


# ------------------------------------------------------------------------------------------- the lists


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for folder, count in (("train", 30), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / folder / name / f"{number}.png").touch()
    return tmp_path


def rows(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


def test_a_list_has_its_share_of_each_class_and_another_seed_has_others(images: Path) -> None:
    write_lists(images / "train", images / "val", images / "lists", (10,), (0, 1))
    lists = {path.name: rows(path) for path in (images / "lists").iterdir()}
    assert len(lists["train-100.csv"]) == 60
    assert len(lists["test.csv"]) == 8
    for seed in (0, 1):
        labels = [row.rpartition(",")[2] for row in lists[f"train-10-{seed}.csv"]]
        assert labels == ["cat"] * 3 + ["dog"] * 3
    assert lists["train-10-0.csv"] != lists["train-10-1.csv"]
    assert set(lists["train-10-0.csv"]) < set(lists["train-100.csv"])
    path = lists["train-100.csv"][0].rpartition(",")[0]
    assert (images / "lists" / path).exists(), "paths are relative to the list"


def test_settings_are_chosen_on_images_that_are_not_fitted_to(images: Path) -> None:
    write_lists(images / "train", images / "val", images / "lists", (10,), (0,))
    fitted, choice = rows(images / "lists" / "fit-100.csv"), rows(images / "lists" / "choose.csv")
    assert len(choice) == 6
    assert not set(fitted) & set(choice)
    assert sorted(fitted + choice) == sorted(rows(images / "lists" / "train-100.csv"))
    assert set(rows(images / "lists" / "fit-10.csv")) < set(fitted)


def test_a_class_with_few_images_keeps_one() -> None:
    taken, rest = part([(Path("a"), "cat"), (Path("b"), "dog"), (Path("c"), "dog")], 0.01, 0)
    assert [label for _, label in taken] == ["cat", "dog"]
    assert len(rest) == 1


# -------------------------------------------------------------------------------------------- the jobs


def trial(name: str, *needs: str) -> Trial:
    return Trial(name, ("probe", "{own}"), "DONE", 1.0, needs)


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Trials whose command notes that it was begun, and does what a file of its name in ``plan`` says."""

    def beit(words: list[str]) -> int:
        own = Path(words[-1])
        with (tmp_path / "begun").open("a") as begun:
            begun.write(f"{own.name}\n")
        plan = (tmp_path / "plan" / own.name).read_text() if (tmp_path / "plan" / own.name).exists() else ""
        if plan == "fail":
            print("what went wrong")
            return 3
        if plan == "wait":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if plan:
            time.sleep(0.5 if plan == "slow" else 60)
        (own / "DONE").touch()
        return 0

    monkeypatch.setattr(study.jobs, "main", beit)
    monkeypatch.setattr(study.jobs, "_preload", lambda: None)
    (tmp_path / "plan").mkdir()
    return Jobs(Places(tmp_path / "work", tmp_path, tmp_path), "cpu", True, {"machine": "M"})


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().split()


def test_trials_wait_for_what_they_need_and_are_run_once(tmp_path: Path, jobs: Jobs) -> None:
    (tmp_path / "plan" / "a").write_text("slow")
    trials = [trial("a"), trial("b", "a"), trial("c")]
    jobs.run(trials, 3, time.monotonic() + 60)
    assert sorted(begun(tmp_path)[:2]) == ["a", "c"]
    assert begun(tmp_path)[2:] == ["b"]
    jobs.run(trials, 3, time.monotonic() + 60)
    assert len(begun(tmp_path)) == 3
    assert spent(tmp_path / "work" / "a")["seconds"] > 0


def test_a_failure_holds_up_what_needs_it_and_nothing_else(tmp_path: Path, jobs: Jobs, capfd: Any) -> None:
    (tmp_path / "plan" / "a").write_text("fail")
    jobs.run([trial("a"), trial("b", "a"), trial("c")], 2, time.monotonic() + 60)
    assert sorted(begun(tmp_path)) == ["a", "c"]
    assert list(jobs.failed) == ["a"]
    assert "exit code 3: what went wrong" in jobs.failed["a"]


@pytest.mark.parametrize("plan", ["wait", "start"], ids=["that saves", "that has not begun"])
def test_when_time_is_over_a_trial_is_stopped_and_the_next_start_continues(
    tmp_path: Path, jobs: Jobs, plan: str
) -> None:
    (tmp_path / "plan" / "a").write_text(plan)
    trials = [trial("a"), trial("b", "a")]
    jobs.run(trials, 1, time.monotonic() + 1.5)
    assert jobs.stopped
    assert not jobs.failed
    assert begun(tmp_path) == ["a"]
    (tmp_path / "plan" / "a").unlink()
    Jobs(Places(tmp_path / "work", tmp_path, tmp_path), "cpu", True, {"machine": "M"}).run(
        trials, 1, time.monotonic() + 60
    )
    assert begun(tmp_path) == ["a", "a", "b"]


def test_what_was_run_otherwise_is_not_taken_for_a_trial(tmp_path: Path, jobs: Jobs) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("epochs: 1")
    first = Trial("a", ("train", "--config", "{recipes}/a.yaml", "precision={precision}", "{own}"), "DONE", 1.0)
    second = trial("b", "a")
    jobs.run([first, second], 1, time.monotonic() + 60)
    places = Places(tmp_path / "work", tmp_path, tmp_path)
    assert places.done(first)
    assert places.done(second)
    record = places.record(first)
    assert record is not None
    assert record["command"] == "beit train --config configs/evidence/a.yaml precision=fp32 evidence/a"
    assert record["machine"] == "M"
    assert places.differs(replace(first, words=(*first.words, "seed=1")))
    assert Places(tmp_path / "work", tmp_path, tmp_path, "bf16").differs(first)
    recipe.write_text("epochs: 2")
    assert not places.done(first)
    assert places.differs(first)
    (tmp_path / "work" / "a.trial.json").unlink()
    assert places.differs(first), "nobody knows how it was run"
    assert places.differs(second), "what it was made from is not known any more"


# ------------------------------------------------------------------------------------------ the report


def result(accuracy: float, **more: Any) -> dict[str, Any]:
    numbers = {"accuracy": accuracy, "linear": accuracy, "knn": accuracy}
    return {
        "command": "beit",
        "recipe": None,
        "machine": "M",
        "cpu_seconds": 60,
        "curves": {},
        "numbers": numbers,
    } | more


def test_differences_name_the_trials_that_came_to_something_else() -> None:
    earlier = {"x/a": result(0.5), "y/b": result(0.5), "z/c": result(0.5, command="beit train")}
    said = list(
        differences({"x/a": result(0.5), "y/b": result(0.53), "z/c": result(0.5), "w/d": result(0)}, earlier)
    )
    assert said[0] == "y/b: linear 0.5300, earlier 0.5000, difference +0.0300"
    assert said[1].startswith("z/c: another command")
    assert said[2] == (
        "3 trials are in both results, 1 of them in another precision or with another command: 1 equal to the "
        "last digit, largest difference of the others 0.0300"
    )
    assert list(differences({"a": result(0.5)}, {})) == ["no trial is in both results with the same seeds"]


def test_what_was_computed_in_another_precision_is_compared_all_the_same() -> None:
    earlier = {"x/a": result(0.5, command="beit train precision=bf16 seed=0")}
    said = list(differences({"x/a": result(0.4, command="beit train precision=fp32 seed=0")}, earlier))
    assert said[0] == "x/a: linear 0.4000, earlier 0.5000, difference -0.1000"
    assert "1 of them in another precision" in said[1]


def test_trials_of_other_seeds_are_compared_by_their_means() -> None:
    earlier = {"finetune/scratch/10/0": result(0.5), "finetune/scratch/10/1": result(0.6)}
    said = list(differences({"finetune/scratch/10/7": result(0.4), "finetune/scratch/1/7": result(0.1)}, earlier))
    assert said[0] == "finetune/scratch/10: mean linear 0.4000 of 1, earlier 0.5500 of 2"
    assert len(said) == 2


@pytest.mark.parametrize(
    ("points", "comparisons", "said"),
    [
        ((8.0, 9.0), 2, "reached in every comparison: +8.5 ± 0.7 (2), +8.0 to +9.0"),
        ((7.0, 10.0), 2, "reached on average: +8.5 ± 2.1 (2), +7.0 to +10.0"),
        ((7.0, 8.0), 2, "not reached: +7.5 ± 0.7 (2), +7.0 to +8.0"),
        ((9.0,), 2, "not decided yet: +9.0 (1), +9.0 to +9.0, of 2 comparisons"),
    ],
)
def test_an_aim_is_reached_by_all_comparisons_or_on_average_or_not(
    points: tuple[float, ...], comparisons: int, said: str
) -> None:
    assert verdict(Spread(tuple(point / 100 for point in points)), 8.0, comparisons) == said


def test_runs_are_compared_with_those_of_the_same_labels() -> None:
    found = {f"finetune/scratch/10/{seed}": result(0.4 + 0.1 * seed) for seed in range(2)}
    found |= {
        f"finetune/tokens-blocks/10/{pre}-{seed}": result(0.5 + 0.1 * seed) for pre in "01" for seed in (0, 1)
    }
    found["finetune/tokens-blocks/10/0-7"] = result(0.0)  # no run from random weights had these labels
    found["finetune/pixels-blocks/10/1-0"] = result(0.3)
    found["finetune/scratch/1/0"] = found["finetune/scratch-4x/10/0"] = result(0.9)
    with_random = gain(found, "finetune/tokens-blocks/10", "finetune/scratch/10")
    assert with_random.values == pytest.approx([0.1] * 4)
    with_pixels = gain(found, "finetune/tokens-blocks/10", "finetune/pixels-blocks/10")
    assert with_pixels.values == pytest.approx([0.2])
    assert gain(found, "finetune/tokens-blocks/10", "finetune/scratch/100").values == ()


def test_the_page_says_what_came_of_the_aims_and_nothing_of_what_was_not_run(tmp_path: Path) -> None:
    found = {f"finetune/scratch/10/{seed}": result(0.40 + 0.01 * seed) for seed in range(3)}
    found |= {f"finetune/tokens-blocks/10/{pre}-{seed}": result(0.51) for pre in "01" for seed in range(3)}
    write_page(found, tmp_path / "results.md", tmp_path / "images")
    page = (tmp_path / "results.md").read_text()
    assert "| 10 % | 51.0 ± 0.0 (6) | 41.0 ± 1.0 (3) | not run | +10.0 ± 0.9 (6) | not run |" in page
    assert "10 % of the labels, +8 points, is reached in every comparison: +10.0 ± 0.9 (6), +9.0 to +11.0." in page
    assert (tmp_path / "images" / "results_labels.png").exists()
    assert "CamVid" not in page
    assert "100 %" not in page


def test_trials_of_one_arm_differ_by_seeds_and_places_only() -> None:
    command = "beit train --run evidence/pretrain/a/{0} seed={0} optimizer.lr={1}"
    found = {f"pretrain/a/{seed}": result(0.5, command=command.format(seed, "1e-3")) for seed in range(2)}
    assert not unlike(found)
    found |= {f"shards/good-{views}": result(0, command=f"beit shards --views {views}") for views in (1, 8)}
    assert not unlike(found)
    assert unlike({**found, "pretrain/a/2": result(0.5, command=command.format(2, "2e-3"))}) == ["pretrain/a"]
    assert unlike({**found, "pretrain/a/2": found["pretrain/a/1"] | {"recipe": "other"}}) == ["pretrain/a"]


def test_the_published_page_is_the_one_of_the_published_results(tmp_path: Path) -> None:
    results, page = ROOT / "docs" / "results.json", ROOT / "docs" / "results.md"
    assert results.exists() == page.exists()
    if page.exists():
        write_page(json.loads(results.read_text())["trials"], tmp_path / "results.md", tmp_path / "images")
        assert page.read_text() == (tmp_path / "results.md").read_text()


# ------------------------------------------------------------------------------------- the whole chain


def evidence(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_quick_study_runs_every_kind_of_trial_and_writes_the_page(tmp_path: Path) -> None:
    where = ("--quick", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    done = evidence(*where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["trials"]
    kinds = {each["command"].split()[1] for each in found.values()}
    assert kinds == {"tokenizer", "shards", "train", "probe", "finetune"}
    assert 0 <= found["segment/scratch/0"]["numbers"]["mean_iou"] <= 1
    assert found["pretrain/pixels-blocks/0"]["numbers"]["steps"] == 3
    page = (tmp_path / "out" / "results.md").read_text()
    assert str(tmp_path) not in page, "a published page names no machine's paths"
    assert "## Segmentation of CamVid" in page
    listed = evidence(*where, "--list").stdout
    assert all(line.endswith("done") for line in listed.splitlines() if line.startswith("  "))
    real = evidence(*where[1:], "--only", "probe/random")
    assert real.returncode == 2
    assert "unlike tokenizer/good" in real.stderr
    assert evidence(*where, "--publish").returncode == 2
    again = evidence(*where, "--only", "probe/random")
    assert not [line for line in again.stdout.splitlines() if "  probe/random" in line]


def test_a_wrong_word_is_refused_with_the_way_out(tmp_path: Path) -> None:
    refused = evidence("--only", "no such trial", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert "--only: got 'no such trial', expected a pattern that names trials; --list shows them" in refused.stderr
    assert evidence("--seeds", "1", "--list").returncode == 2
