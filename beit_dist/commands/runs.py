"""``beit runs``: the runs in a folder, what each is doing and what has come of it; or one of them, live."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from beit_dist.commands.options import access_of, add_json, add_storage, at_least, write_json
from beit_dist.commands.parsing import CommandParser, spelling
from beit_dist.errors import ConfigError, UserError

if TYPE_CHECKING:
    from beit_dist.reports.run_search import Found
    from beit_dist.reports.run_state import RunState
    from beit_dist.storage.access import Access

SENTENCE = "List runs and what each is doing, or follow one."

EXAMPLES = """\
  beit runs
  beit runs runs/ shared/runs/ --follow
  beit runs runs/base --follow
  beit runs s3://bucket/runs --json runs.json
"""

MORE = """\
  running     steps are completing
  waiting     the newest start has not completed a step yet
  done        all steps are complete
  preempted   stopped on request, can continue
  failed      an error ended it; its first line is shown
  stalled     no sign of life for a long time; as far as is known, its processes still run
  dead        its processes ended and left no marker
  unfinished  a data set with missing shards; STEP counts the finished ones
  unknown     a data set whose job cannot be read

Everything is read from the folders, and no run is disturbed. Processes are looked for only on this host. The
numbers of a run at a URL are those of its newest checkpoint. LEFT assumes the pace of the last steps. A terminal
shows what fits its width, the newest run first; a pipe gets every column, and no colours.

With --follow, a single run is followed until it is done or has failed, and a folder until you press Ctrl-C.

Exit codes: 0 done; 1 there are no runs, or the run that was followed has failed; 2 the command is wrong.
"""

_AT_ONCE = 8
_SECONDS, _SECONDS_AT_URLS = 2, 15


def parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("runs", SENTENCE, EXAMPLES, MORE)
    what = parser.add_argument_group("what to look at")
    what.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="runs, or folders with runs, here or at URLs (default: runs)"
    )
    what.add_argument(
        "--depth",
        type=at_least("--depth", 0),
        default=3,
        metavar="N",
        help="levels of subfolders to look into (default: %(default)s)",
    )
    add_storage(what)
    how = parser.add_argument_group("how to show it")
    how.add_argument(
        "--follow",
        "--watch",
        action="store_true",
        help="keep looking: a terminal is redrawn, a pipe gets a line for each change",
    )
    how.add_argument(
        "--every",
        type=at_least("--every", 1),
        metavar="S",
        help=f"seconds between looks (default: {_SECONDS}; {_SECONDS_AT_URLS} at URLs)",
    )
    add_json(how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the runs; returns the exit code."""
    arguments = parser().parse(argv)
    if arguments.follow and arguments.json:
        raise ConfigError("--json", arguments.json, "no --follow beside it")
    arguments.folders = arguments.folders or ["runs"]
    access = access_of(arguments)
    look = Look(arguments.folders, arguments.depth, access)
    if arguments.follow:
        from beit_dist.storage.place import is_url

        remote = any(map(is_url, arguments.folders))
        return follow(look, arguments.every or (_SECONDS_AT_URLS if remote else _SECONDS))
    look.again()
    if arguments.json:
        write_json(arguments.json, [run.facts() for run in look.runs])
    if not look.runs:
        print(look.none, file=sys.stderr)
        return 1
    if arguments.json != "-":
        print("\n".join(look.lines(sys.stdout.isatty())), flush=True)
    return 0


class Look:
    """A look at folders of runs.

    Args:
        folders: paths or URLs.
        depth: levels below to look into.
        access: how URLs are reached.

    Attributes:
        runs: what was found, that with the last sign of life first.
        one: whether a run was named, not a folder of runs.
    """

    def __init__(self, folders: Sequence[str], depth: int, access: Access) -> None:
        self._folders, self._depth, self._access = folders, depth, access
        self._refused: list[str] = []
        self.runs: list[RunState] = []
        self.one = False
        self.at = 0.0

    def again(self) -> None:
        """Find the runs and read what they are doing.

        Raises:
            ConfigError: a folder is no place, or cannot be listed.
            StorageError: its store does not answer, or refuses.
        """
        from beit_dist.reports.run_search import find_runs
        from beit_dist.storage.opening import open_place

        self._refused, found = [], []
        for where in self._folders:
            try:
                here = find_runs(open_place(where, self._access, "FOLDER"), self._depth, self._refused)
                found += [(each, self._name(where, each)) for each in here]
            except FileNotFoundError:
                self._refused.append(f"{where}: there is no such folder")
            except UserError:
                raise
            except OSError as error:
                raise ConfigError("FOLDER", where, f"a folder that can be listed ({error.strerror})") from None
        self.at = time.time()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            runs = list(pool.map(lambda each: _state(each[0], each[1], self.at), found))
        self.runs = sorted(runs, key=lambda run: (-(run.active_at or 0.0), run.name))
        self.one = len(found) == len(self._folders) == 1 and not found[0][0].below

    @property
    def none(self) -> str:
        """What to say where there are no runs."""
        lines = [
            f"no runs in {' and '.join(self._folders)}, and none in the {self._depth} levels of folders below",
            *self._refused,
            f"Name the folder that they are in: {spelling('runs').alone} FOLDER. Or start one: "
            "beit train run=runs/NAME data=SHARDS",
        ]
        return "\n".join(lines)

    def lines(self, terminal: bool) -> list[str]:
        """The table, or all of the one run; fit for the terminal, or with everything."""
        from beit_dist.reports.run_table import cut, details, table

        width = shutil.get_terminal_size().columns - 1 if terminal else None
        colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        if self.one:
            return details(self.runs[0], self.at, width, colours=colours)
        refused = [f"not listed: {each}" for each in self._refused]
        listed = table(self.runs, self.at, width, colours=colours)
        return listed + (refused if width is None else [cut(each, width) for each in refused])

    def _name(self, where: str, found: Found) -> str:
        below = "/".join(found.below)
        if len(self._folders) > 1:
            return f"{where.rstrip('/')}/{below}".rstrip("/")
        own = os.path.abspath(found.place.path).rpartition("/")[2] if found.place.is_local else found.place.name
        return below or own


def follow(look: Look, seconds: float) -> int:
    """Look again and again; returns the exit code when the one run that was named is done or has failed."""
    terminal = sys.stdout.isatty()
    drawn = 0
    said: dict[str, object] = {}
    while True:
        look.again()
        if not look.runs:
            print(look.none, file=sys.stderr)
            return 1
        if terminal:
            drawn = _draw(look.lines(True), drawn)
        else:
            _say_changes(look, said)
        if look.one and look.runs[0].state in ("done", "failed"):
            return int(look.runs[0].state == "failed")
        time.sleep(seconds)


def _draw(lines: list[str], drawn: int) -> int:
    """Draw over the lines that were drawn before; how many there are now."""
    lines = lines[: max(1, shutil.get_terminal_size().lines - 1)]
    up = f"\033[{drawn}F" if drawn else ""
    print(up + "".join(f"\033[2K{line}\n" for line in lines) + "\033[J", end="", flush=True)
    return len(lines)


def _say_changes(look: Look, said: dict[str, object]) -> None:
    from beit_dist.reports.run_table import line_of

    for run in reversed(look.runs):
        now = (run.state, run.step, run.attempts, run.saved_step, run.damage)
        if said.get(run.where) != now:
            said[run.where] = now
            print(line_of(run, look.at), flush=True)


def _state(found: Found, name: str, now: float) -> RunState:
    from beit_dist.reports.run_state import read_state

    return read_state(found.place, name, now) if found.is_run else _of_job(found, name)


def _of_job(found: Found, name: str) -> RunState:
    from beit_dist.reports.run_state import RunState
    from beit_dist.tokenizing.job_state import job_state

    where, kind = str(found.place), "shards"
    try:
        job = job_state(found.place)
    except (UserError, OSError) as error:
        return RunState(where=where, name=name, kind=kind, state="unknown", damage=(str(error),))
    ready = not job.finished and job.made == job.shards
    return RunState(
        where=where,
        name=name,
        kind=kind,
        state="done" if job.finished else "unfinished",
        step=job.made,
        total=job.shards,
        active_at=job.active_at,
        note=f"to finish it: beit shards --out {shlex.quote(where)} --finish" if ready else "",
    )
