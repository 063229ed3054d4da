"""Run the study of docs/results.md: whether pre-training helps, by how much, and at what price.

Its trials are commands of `beit`, listed in tools/study/trials.py. What was stopped or killed continues.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: a trial has one core, whatever the machine has

import argparse
import importlib.metadata
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from beit_dist.errors import ConfigError, UserError, exit_cleanly
from study.jobs import Jobs
from study.lists import write_lists
from study.places import Places
from study.trials import SHARES, Seeds, Trial, chosen, parts, study

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results.json", ROOT / "docs" / "results.md"
EXAMPLES = """\
examples:
  python tools/evidence.py --data DATA --list
  python tools/evidence.py --data DATA --part 1 --hours 2
  python tools/evidence.py --data DATA --only 'pretrain/tokens-blocks' --seeds 5/5,6 --out /tmp/others
  python tools/evidence.py --quick --out /tmp/quick

DATA has cifar10/train and cifar10/val with class folders, camvid/images and camvid/labels with train and val in
each, and photos. Only what the chosen trials read has to be there.
"""


class StudyError(UserError):
    """Trials failed, or do not fit together."""

    exit_code = 1


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of the images (default: %(default)s)")
    add("--out", type=Path, default=Path("evidence"), help="folder of all trials (default: %(default)s)")
    add("--list", action="store_true", help="print parts, trials, their predicted cost and state; run nothing")
    add("--only", metavar="PATTERN", help="trials whose names match, and what they need")
    add("--part", type=int, action="append", metavar="N", help="only this part; may be given again")
    add("--all", action="store_true", help="also what is marked as extra in the list")
    add("--hours", type=float, default=math.inf, help="stop after so many hours, with checkpoints")
    add("--jobs", type=int, help="trials at once (default: one for each core)")
    add("--device", default="auto", help="auto, cpu or cuda, for all trials (default: %(default)s)")
    add("--precision", default="fp32", help="fp32, or bf16 where the device is fast in it (default: %(default)s)")
    add("--seeds", default="0,1/0,1,2", help="of pre-training / of fine-tuning (default: %(default)s)")
    add("--publish", action="store_true", help="put the results into docs/, beside those of other trials there")
    add("--quick", action="store_true", help="all kinds of trials on generated images, each a few steps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or as much of it as was asked for; the exit code."""
    options = command_line().parse_args(argv)
    if options.quick and options.publish:
        raise ConfigError("--publish", True, "no --quick: its trials learn nothing")
    forked = not _on_a_gpu(options.device)
    if forked:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for a GPU
    seeds, wanted = _wanted(options)
    data, work = options.data.resolve(), options.out.resolve()
    places = Places(work, data, ROOT / "configs" / "evidence", options.precision)
    if options.list:
        print("\n".join(_listed(_trials(options), places)))
        return 0
    _refuse_others(places, wanted)
    if options.quick:
        from study.quick import write_data

        write_data(data)
    _prepare(places, seeds, wanted)
    device = options.device if options.device != "auto" else "cpu" if forked else "cuda"
    jobs = Jobs(places, device, forked, {"machine": _machine(forked)})
    jobs.run(wanted, options.jobs or len(os.sched_getaffinity(0)), time.monotonic() + 3600 * options.hours)
    _report(places, _trials(options), publish=options.publish)
    left = [trial.name for trial in wanted if not places.done(trial)]
    if jobs.failed:
        raise StudyError(
            f"{len(jobs.failed)} trials failed: {', '.join(jobs.failed)}. Their output is beside their folders in "
            f"{work}. The same command continues."
        )
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} trials are done; the same command continues"
        if left
        else "done"
    )
    return 0


def _trials(options: argparse.Namespace) -> list[Trial]:
    trials = study(_seeds(options.seeds))
    if options.quick:
        from study.quick import quick

        trials = quick(trials)
    return trials


def _wanted(options: argparse.Namespace) -> tuple[Seeds, list[Trial]]:
    """The trials that were asked for, and all that they need.

    Raises:
        ConfigError: there are no such ones.
    """
    trials, seeds = _trials(options), _seeds(options.seeds)
    wanted = [trial for trial in trials if options.all or options.only or options.part or not trial.extra]
    if options.quick and not options.only:
        wanted = trials
    if options.part:
        cut = parts(trials)
        if bad := [number for number in options.part if not 1 <= number <= len(cut)]:
            raise ConfigError("--part", bad[0], f"1 to {len(cut)}; --list shows them")
        names = {trial.name for number in options.part for trial in cut[number - 1]}
        wanted = [trial for trial in wanted if trial.name in names]
    if options.only:
        wanted = [trial for trial in wanted if re.search(options.only, trial.name)]
    if not wanted:
        raise ConfigError("--only", options.only, "a pattern that names trials; --list shows them")
    return seeds, chosen(trials, wanted)


def _seeds(text: str) -> Seeds:
    try:
        pretraining, finetuning = (tuple(map(int, each.split(","))) for each in text.split("/"))
    except ValueError:
        raise ConfigError("--seeds", text, "numbers such as 0,1/0,1,2: of pre-training / of fine-tuning") from None
    return Seeds(pretraining, finetuning)


def _on_a_gpu(device: str) -> bool:
    """Whether trials compute on a GPU; asked without PyTorch, as asking it would spoil a fork."""
    return device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists())


def _refuse_others(places: Places, wanted: Sequence[Trial]) -> None:
    """Stop if a trial in the folder was run otherwise than it would be now.

    Raises:
        ConfigError: one was.
    """
    others = [trial.name for trial in wanted if places.differs(trial)]
    if others:
        raise ConfigError(
            "--out",
            str(places.work),
            f"trials run with the present commands, recipes and precision, unlike {', '.join(others)}",
            "Take another folder, or remove those trials: NAME and NAME.*.",
        )


def _machine(forked: bool) -> str:
    """What trials compute on. A processor is named without a look for a GPU, which would spoil a fork."""
    from beit_dist.commands.bench import cpu_model, machine

    return f"{cpu_model() if forked else machine()['gpu']}, PyTorch {importlib.metadata.version('torch')}"


def _listed(trials: Sequence[Trial], places: Places) -> list[str]:
    lines = []
    for number, part in enumerate(parts(trials), 1):
        minutes = sum(trial.seconds for trial in part) / 120
        lines.append(f"part {number}{', extra' if part[0].extra else ''}: {minutes:.0f} minutes on two cores")
        for trial in part:
            state = "done" if places.done(trial) else "run otherwise" if places.differs(trial) else ""
            lines.append(f"  {trial.name:<36} {trial.seconds / 60:6.1f} min of a core  {state}".rstrip())
    return lines


def _prepare(places: Places, seeds: Seeds, trials: Sequence[Trial]) -> None:
    """The lists of labelled images, if a trial reads one."""
    places.work.mkdir(parents=True, exist_ok=True)
    if any("/lists/" in word for trial in trials for word in trial.words):
        cifar = places.data / "cifar10"
        shares = [share for share in SHARES if share < 100]
        write_lists(cifar / "train", cifar / "val", places.work / "lists", shares, seeds.finetuning)


def _report(places: Places, trials: Sequence[Trial], *, publish: bool) -> None:
    """Write the results, and say how they differ from those in docs/."""
    from study.outcomes import differences, outcome, unlike
    from study.page import write_page

    found = {trial.name: outcome(trial, places) for trial in trials if places.done(trial)}
    earlier = json.loads(RESULTS.read_text())["trials"] if RESULTS.exists() else {}
    print("\n".join(differences(found, earlier)))
    (places.work / "results.json").write_text(json.dumps({"trials": found}, indent=1) + "\n")
    write_page(found, places.work / "results.md", places.work / "images")
    if publish:
        if mixed := unlike({**earlier, **found}):
            raise StudyError(
                f"not published: {', '.join(mixed)} would have trials with other settings in {RESULTS} than in "
                f"{places.work}. Remove them from the one or the other."
            )
        RESULTS.write_text(json.dumps({"trials": {**earlier, **found}}, indent=1) + "\n")
        write_page({**earlier, **found}, PAGE, ROOT / "docs" / "images")
    print(f"wrote {places.work / 'results.md'}" + (f" and {PAGE}" if publish else ""))


if __name__ == "__main__":
    if sys.path[0] != str(ROOT):
        sys.path.insert(1, str(ROOT))  # a checkout that is not installed
    exit_cleanly(main)
