"""Where else the numbers of a run go: TensorBoard and Weights & Biases, on rank 0, both off by default."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from beit_dist.config.run import RunConfig
from beit_dist.errors import ConfigError

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes numbers of steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Note the numbers of a step; those that are not finite are left out before."""

    def close(self) -> None:
        """Write what is noted."""


class Sinks:
    """All sinks of a run. One that fails is given up with a warning: looking on must not stop a run."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Hand the numbers to each sink."""
        finite = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
        self._each(lambda sink: sink.write(step, finite))

    def close(self) -> None:
        """Close each sink."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                _log.warning("%s failed and is no longer used: %s", type(sink).__name__, error)
                self._sinks.remove(sink)


def open_sinks(config: RunConfig, run: Path, step: int) -> Sinks:
    """Open what the recipe asks for.

    Args:
        config: the recipe.
        run: the run folder.
        step: where the run continues; what was written past it is void.

    Raises:
        ConfigError: a package is not installed.
    """
    wanted: dict[str, Callable[[], Sink]] = {}
    if config.logging.tensorboard:
        wanted["tensorboard"] = lambda: TensorBoardSink(run / "tensorboard", step)
    if config.logging.wandb is not None:
        wanted["wandb"] = lambda: WandbSink(config, run)
    sinks: list[Sink] = []
    for name, opened in wanted.items():
        try:
            sinks.append(opened())
        except ConfigError:
            raise
        except Exception as error:  # no key, no network: a run that is started again at night must not end for it
            _log.warning("logging.%s could not be opened and is not used: %s", name, error)
    return Sinks(sinks)


def check_packages(config: RunConfig) -> None:
    """Refuse a recipe whose sinks are not installed, before anything starts.

    Raises:
        ConfigError: names the package and how to install it.
    """
    if config.logging.tensorboard:
        _summary_writer()
    if config.logging.wandb is not None:
        _wandb()


class TensorBoardSink:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _summary_writer()(log_dir=str(folder), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Sink`."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run, the same one after a resume; ``offline`` writes to ``RUN/wandb`` only.

    The key is wandb's own affair (``wandb login`` or its environment variable) and is neither read nor written
    here; neither the code, the command line nor the environment is sent.
    """

    def __init__(self, config: RunConfig, run: Path) -> None:
        wandb = _wandb()
        path = run.resolve()
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=path.name,
            id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run),
            mode=config.logging.wandb,
            config=config.model_dump(mode="json", exclude=set(config.of_the_host)),
            settings=wandb.Settings(
                disable_git=True, disable_code=True, x_disable_meta=True, x_save_requirements=False, console="off"
            ),
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """See :class:`Sink`."""
        self._run.finish()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard", True, "the package tensorboard", "pip install 'beit_dist[tensorboard]'"
        ) from None
    return SummaryWriter


def _wandb() -> Any:
    # Without this wandb 0.31 sends reports about itself to its makers, offline too; it looks when it is imported.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "logging.wandb", "on", "the package wandb", "pip install 'beit_dist[wandb]', or set it to null."
        ) from None
    return wandb
