"""``compile: true``, looked after: what it needs is there, and what torch did with the blocks is said.

torch.compile does not fail where it cannot help: past its limit of graphs for one function it runs what is new
uncompiled, with a warning of its own that says nothing to a user.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from beit_dist.errors import ConfigError

_log = logging.getLogger(__name__)
_LOGGER = "torch._dynamo.convert_frame"  # of the one warning of a limit, in every torch from 2.6 on
_LIMIT = re.compile(r"hit config\.(\w*(?:recompile|cache_size)_limit) \((\d+)\)")  # either name: torch changes it
_REASON = re.compile(r"last reason: (.+)")
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_LEFT_OUT = "__dynamo_disable"
_WAY_OUT = "TORCH_LOGS=recompiles prints what torch compiles again and why; compile=false turns it off."


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Have each block compiled at its first call, in place: parameters keep their names.

    Blocks that are alike reuse what was compiled for the first of them (in training and in evaluation).
    """
    kinds = {tuple(parameter.shape for parameter in block.parameters()) for block in blocks_of(model)}
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    # torch counts the graphs of one function, here `Block.forward`, however many blocks it is of; each kind may
    # take one in training, one in evaluation, and one that stops at a graph break.
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 3 * len(kinds)))
    for block in blocks_of(model):
        block.compile(backend=backend, dynamic=False)


def keep_compiled_code(device: torch.device) -> None:
    """Let what is compiled outlive this host's temporary files, where torch keeps it: in the user's cache.

    Code for one processor or GPU can be wrong on another, so each has a folder. ``TORCHINDUCTOR_CACHE_DIR`` wins;
    where the cache cannot be written to, all stays as it is.
    """
    if _CACHE in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "beit_dist" / "compiled" / f"torch-{torch.__version__}" / _kind_of(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[_CACHE] = str(folder)  # Triton's own is a folder in it


def _kind_of(device: torch.device) -> str:
    """A folder's name for all devices that run the same code."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        named = f"{torch.cuda.get_device_name(device)}-sm{major}{minor}"
    else:
        named = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^\w.-]+", "-", named)


def spare_compiler() -> None:
    """Keep AdamW from loading PyTorch's compiler, for a start that compiles nothing.

    Its methods load it only to be left out of what is compiled, which takes a third of the CPU time of a start.
    Those marked as left out already are called as they are (``torch/_compile.py``). ``step`` has a wrapper besides
    (``_use_grad_for_differentiable``), which turns gradients off and breaks graphs.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, _LEFT_OUT):
            setattr(plain, _LEFT_OUT, plain)
    step = torch.optim.AdamW.step
    if "step" not in vars(torch.optim.AdamW) and hasattr(step, "__wrapped__"):
        torch.optim.AdamW.step = torch.no_grad()(step.__wrapped__)  # type: ignore[method-assign]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is compiled of a model: the modules that note whether they ran uncompiled."""
    return [module for module in model.modules() if hasattr(module, "ran_uncompiled")]


class CompiledBlocks:
    """Says after a start's first step how many blocks run compiled, and warns whenever torch's limit is hit.

    Args:
        model: whose blocks are to be compiled at their first call.
        wanted: they are; else there is nothing to say.
        loud: on rank 0; what it says holds for all ranks, which compile alike.
    """

    def __init__(self, model: nn.Module, wanted: bool, loud: bool) -> None:
        self._blocks = blocks_of(model) if wanted else []
        self._loud, self._unsaid = loud, bool(self._blocks)
        self._filter = _LimitFilter(loud)
        if self._blocks:
            logging.getLogger(_LOGGER).addFilter(self._filter)
            self._graphs_before = _graphs()

    def micro_batch_ended(self) -> None:
        """Called when the blocks have run forward and backward; the first call says what became of them."""
        if not self._unsaid:
            return
        self._unsaid = False
        if self._loud:
            print(self.summary(), flush=True)

    def summary(self) -> str:
        """One line: how many blocks run compiled, from how many graphs."""
        blocks, graphs = len(self._blocks), _graphs() - self._graphs_before
        compiled = blocks - sum(bool(block.ran_uncompiled) for block in self._blocks)
        said = f"compile: {compiled} of {blocks} blocks run compiled; {graphs} graph{'s' * (graphs != 1)} in all"
        return said if compiled == blocks else f"{said}; the rest run uncompiled, which is slower. {_WAY_OUT}"

    def close(self) -> None:
        """Leave torch's warnings to torch."""
        logging.getLogger(_LOGGER).removeFilter(self._filter)


def check_compiler(device: str) -> None:
    """Refuse to compile where the first step would fail for want of a compiler, behind a screen of traceback.

    Args:
        device: its type. For a CPU torch writes C++, and for a GPU Triton writes C to start its kernels.

    Raises:
        ConfigError: there is no compiler, or Python's headers are missing.
    """
    if device not in ("cpu", "cuda"):
        return
    variable, language, usual = ("CXX", "C++", ["g++"]) if device == "cpu" else ("CC", "C", ["clang", "gcc"])
    named = os.environ.get(variable)  # as torch and Triton look for it
    compilers = [named] if named else usual
    if not any(map(shutil.which, compilers)):
        raise ConfigError(
            "compile",
            True,
            f"a {language} compiler on this machine, which has no {' or '.join(compilers)}",
            f"Install one (apt-get install {usual[-1]}), name another in {variable}, or set compile=false.",
        )
    headers = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}
    if not any(Path(folder, "Python.h").is_file() for folder in headers):
        raise ConfigError(
            "compile",
            True,
            f"Python's C headers on this machine, which has no Python.h in {' or '.join(sorted(headers))}",
            "Install them (apt-get install python3-dev), or set compile=false.",
        )


class _LimitFilter(logging.Filter):
    """Puts a warning of ours in the place of torch's."""

    def __init__(self, loud: bool) -> None:
        super().__init__()
        self._loud = loud

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether torch's own message is passed on."""
        message = record.getMessage()
        if not (limit := _LIMIT.search(message)):
            return True
        if self._loud:
            reason = _REASON.search(message)
            _log.warning(
                "compile: torch has compiled one function %s times, which is its limit (%s). Whatever "
                "needs another graph now runs uncompiled: the same model, but slower. Last reason: %s. %s",
                limit[2],
                limit[1],
                " ".join(reason[1].split()).rstrip(".") if reason else "unknown",
                _WAY_OUT,
            )
        return False


def _graphs() -> int:
    """How many graphs this process has compiled."""
    from torch._dynamo.utils import counters  # takes a second to import: only where something is compiled

    return int(counters["stats"]["unique_graphs"])
