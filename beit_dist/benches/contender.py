"""One contender in a process of its own: the compiler's limits and caches must not leak from one to another.

Reads a line for each thing to do, ``step N`` or ``product N``, and answers with a line of JSON: seconds for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from beit_dist.benches.contenders import CONTENDERS, UPDATED, UnavailableError
from beit_dist.config.model import ModelConfig

_WARM_UP = 3
"""Steps that are not counted on a GPU: they compile and find their kernels. On a CPU one does."""


class Contender:
    """A contender that waits in its process until it is asked to run.

    Args:
        name: one of :data:`CONTENDERS` or :data:`UPDATED`.
        size: of the model.
        batch: images of a step.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        original: folder of the original code.
        clock: ``wall``, or ``own``: on a CPU with one thread the processor's time, which hardly changes with what
            other programs do at the same time.
        environment: of its process.

    Raises:
        UnavailableError: it is not to be had here, or failed.
    """

    def __init__(
        self,
        name: str,
        size: str,
        batch: int,
        precision: str,
        original: str | None,
        clock: str = "own",
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        arguments = [name, size, str(batch), precision, original or "", clock]
        self._errors = tempfile.TemporaryFile(mode="w+")  # what it prints there matters only if it fails  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "beit_dist.benches.contender", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.first = self._answer()[0]
        """Seconds of its first step, in which it compiles."""

    def step(self, number: int = 1) -> list[float]:
        """Seconds of so many steps, one after the other."""
        return self._ask("step", number)

    def product(self, number: int = 1) -> list[float]:
        """Seconds of so many large products, in its precision."""
        return self._ask("product", number)

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def step_beside(self, other: Contender, number: int) -> list[float]:
        """Seconds of so many steps, while ``other`` takes as many."""
        self._tell("step", number)
        other._tell("step", number)
        answer = self._answer()
        other._answer()
        return answer

    def _ask(self, what: str, number: int) -> list[float]:
        self._tell(what, number)
        return self._answer()

    def _tell(self, what: str, number: int) -> None:
        assert self._process.stdin is not None  # for the type checker: it was asked for
        self._process.stdin.write(f"{what} {number}\n")
        self._process.stdin.flush()

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None  # for the type checker: it was asked for
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else self._last_words()
        if isinstance(answer, str):
            self._end()
            raise UnavailableError(answer)
        return [float(seconds) for seconds in answer]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return f"it ended with exit code {code}: {(self._errors.read().splitlines() or ['no message'])[-1]}"

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def main(name: str, size: str, batch: int, precision: str, original: Path | None, clock: str) -> None:
    """Build the contender and do what standard input says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    own = clock == "own" and device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if own else time.perf_counter

    def timed(work: Callable[[], object]) -> float:
        began = now()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return now() - began

    more = {"folder": original} if name.startswith("original") else {}
    try:
        step = (CONTENDERS | UPDATED)[name](ModelConfig(size=size), batch, device, kind, **more)
        first = timed(step)
        for _ in range(_WARM_UP if device.type == "cuda" else 0):
            step()
    except UnavailableError as error:
        return _say(str(error))
    except torch.OutOfMemoryError:
        return _say(f"out of memory at batch {batch}")
    _say([first])
    side = largest_product(device)
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    work: dict[str, Callable[[], object]] = {"step": step, "product": lambda: left @ right}
    for line in sys.stdin:
        what, number = line.split()
        _say([timed(work[what]) for _ in range(int(number))])
    return None


def largest_product(device: torch.device) -> int:
    """Rows and columns of the matrices whose product counts as what the machine can do."""
    return 8192 if device.type == "cuda" else 2048


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0], given[1], int(given[2]), given[3], Path(given[4]) if given[4] else None, given[5])
