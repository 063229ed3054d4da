"""``compile: true`` compiles every block once, and what torch did or could not do is said."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from beit_dist.config.model import ModelConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine import task
from beit_dist.engine.compiled import CompiledBlocks, check_compiler, compile_blocks, keep_compiled_code
from beit_dist.engine.resolve import resolve
from beit_dist.engine.wrapped import build_engine
from beit_dist.errors import ConfigError
from beit_dist.models.heads.targets import HEADS
from beit_dist.models.mim import MaskedImageModel
from beit_dist.models.vit import Block
from beit_dist.tasks.pretraining.task import Pretraining

SMALL: dict[str, Any] = {"width": 32, "heads": 2, "image_size": 32, "patch_size": 8, "vocabulary": 64}
DEPTH = 12  # that of the shipped recipes, and above torch's limit of graphs for one function
SHIPPED_DROP_PATH = PretrainingConfig(run="r").model.drop_path


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Blocks are compiled by a backend that needs no C++ compiler and counts its graphs."""
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(task, "compile_blocks", lambda model: compile_blocks(model, backend))
    return backend


def a_batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random patches, tokens and positions."""
    patches = torch.randint(0, 256, (rows, 16, 192), dtype=torch.uint8)
    return patches, torch.randint(0, 64, (rows, 16)), torch.arange(7).expand(rows, -1)


def keeps(rows: int) -> Tensor:
    """Random stochastic-depth keeps."""
    return torch.randint(0, 2, (rows, DEPTH, 2), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("variant", "recompute"),
    [
        ({"drop_path": SHIPPED_DROP_PATH}, False),
        ({"drop_path": SHIPPED_DROP_PATH}, True),
        ({"relative_positions": False, "absolute_positions": True, "layer_scale": 0, "drop_path": 0.1}, False),
        ({"drop_path": 0}, False),
    ],
    ids=["released", "recomputed", "paper", "no drop path"],
)
def test_all_blocks_are_one_graph_for_training_and_one_for_evaluation(
    counted: CompileCounterWithBackend, variant: dict[str, Any], recompute: bool
) -> None:
    model = MaskedImageModel(ModelConfig(**SMALL, depth=DEPTH, **variant), recompute=recompute)
    model.initialise(0)
    compile_blocks(model, counted)
    for graphs in (1, 2):
        for _ in range(2):
            model(*a_batch(3), keeps(3) if variant["drop_path"] else None)[0].backward()
            assert counted.frame_count == graphs
        with torch.no_grad():
            model(*a_batch(3))
        assert counted.frame_count == 2
    assert not any(block.ran_uncompiled for block in model.blocks)


@pytest.mark.parametrize("target", HEADS)
def test_the_score_is_one_graph_more_and_gives_the_same_numbers(
    counted: CompileCounterWithBackend, target: str
) -> None:
    model = MaskedImageModel(ModelConfig(**SMALL, depth=2, target=target))
    model.initialise(0)
    batch = a_batch(3)
    expected = model(*batch)
    model.compile_score(counted)  # type: ignore[arg-type]  # torch takes functions too
    for _ in range(2):
        got = model(*batch)
        got[0].backward()
        torch.testing.assert_close(got, expected)
        assert counted.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "rows"),
    [(0, "fp32", 1), (1, "bf16", 4), (2, "bf16", 1)],
    ids=["stage 0", "stage 1", "stage 2"],
)
def test_they_stay_so_under_deepspeeds_engine(
    joined: torch.device, counted: CompileCounterWithBackend, stage: int, precision: str, rows: int
) -> None:
    config = PretrainingConfig(
        run="r",
        model={**SMALL, "depth": DEPTH},  # type: ignore[arg-type]
        masking={"min_block": 4},  # type: ignore[arg-type]
        global_batch=2 * rows,
        micro_batch=rows,
        compile=True,
    )
    settings = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}}
    engine = build_engine(Pretraining(config), resolve(config, settings, 1), joined)
    for _ in range(2):
        for _ in range(2):
            engine.backward(engine(*a_batch(rows), keeps(rows))[0], scale_wrt_gas=False)
            engine.step()
        with torch.no_grad():
            engine.module(*a_batch(rows))
        assert counted.frame_count == 2
    assert not any(block.ran_uncompiled for block in engine.module.blocks)


def test_what_was_compiled_is_said_once(
    counted: CompileCounterWithBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MaskedImageModel(ModelConfig(**SMALL, depth=DEPTH))
    compile_blocks(model, counted)
    compiled = CompiledBlocks(model, wanted=True, loud=True)
    for _ in range(2):
        model(*a_batch(2), keeps(2))[0].backward()
        compiled.micro_batch_ended()
    compiled.close()
    assert capsys.readouterr().out == "compile: 12 of 12 blocks run compiled; 1 graph in all\n"


def test_where_nothing_is_to_be_compiled_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = MaskedImageModel(ModelConfig(**SMALL, depth=2))
    compiled = CompiledBlocks(model, wanted=False, loud=True)
    model(*a_batch(2))
    compiled.micro_batch_ended()
    compiled.close()
    assert capsys.readouterr().out == ""


def test_torchs_limit_is_a_warning_that_names_the_way_out(
    counted: CompileCounterWithBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = Block.forward

    def with_a_number_of_its_own(block: Block, *inputs: Any) -> Tensor:
        return forward(block, *inputs) * block.number

    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, which timm lifts at its import
        monkeypatch.setattr(Block, "forward", with_a_number_of_its_own)
        model = MaskedImageModel(ModelConfig(**SMALL, depth=DEPTH))
        for number, block in enumerate(model.blocks):
            block.number = 1 + number / 100
        compile_blocks(model, counted)
        compiled = CompiledBlocks(model, wanted=True, loud=True)
        model(*a_batch(2), keeps(2))[0].backward()
        compiled.micro_batch_ended()
        compiled.close()
        limit = torch._dynamo.config.recompile_limit
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.name == "beit_dist.engine.compiled"
    assert f"compiled one function {limit} times" in warning.getMessage()
    assert "number" in warning.getMessage()
    said = capsys.readouterr().out
    assert f"{limit} of 12 blocks run compiled; {limit} graphs in all; the rest" in said
    assert all("compile=false" in text for text in (warning.getMessage(), said))


def test_other_warnings_of_torch_are_let_through(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._dynamo.convert_frame")
    compiled = CompiledBlocks(MaskedImageModel(ModelConfig(**SMALL, depth=1)), wanted=True, loud=True)
    with caplog.at_level(logging.WARNING, logger.name):
        logger.warning("something else")
        logger.warning("torch._dynamo hit config.%s (%s)\n   function: f", "cache_size_limit", 8)
    compiled.close()
    logger.warning("torch._dynamo hit config.%s (%s)", "recompile_limit", 8)
    names = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
    assert names == [logger.name, "beit_dist.engine.compiled", logger.name]


@pytest.mark.parametrize(
    ("device", "variable", "said"),
    [("cpu", "CXX", r"a C\+\+ compiler .* no g\+\+"), ("cuda", "CC", "a C compiler .* no clang or gcc")],
)
def test_without_a_compiler_the_start_is_refused(
    device: str, variable: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"compile: got True, expected {said}"):
        check_compiler(device)
    compiler = tmp_path / "one-of-my-own"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, compiler.name)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    with pytest.raises(ConfigError, match=r"no Python\.h in .*python3-dev"):
        check_compiler(device)
    (tmp_path / "Python.h").touch()
    check_compiler(device)


@pytest.mark.slow
def test_a_run_that_compiles_nothing_does_not_load_the_compiler(new_run: Callable[..., Any]) -> None:
    """DeepSpeed would, for its Muon, which no run uses."""
    run = new_run("run", overrides=["loader.workers=0", "steps=7"])
    train, run.entry = run.entry, run.folder.parent / "loaded.py"
    run.entry.write_text(
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print([name for name in sys.modules if name == 'torch._inductor.compile_fx']))\n"
        f"runpy.run_path({str(train)!r}, run_name='__main__')\n"
    )
    code, output = run.finish()
    assert code == 0, output
    assert output.endswith("\n[]\n")


@pytest.mark.slow
def test_a_run_says_that_all_its_blocks_are_compiled(new_run: Callable[..., Any]) -> None:
    run = new_run("run", overrides=["loader.workers=0", "steps=2", "optimizer.warmup_steps=1", "compile=true"])
    code, output = run.finish()
    assert code == 0, output
    assert output.count("compile: 2 of 2 blocks run compiled; 1 graph in all\n") == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache; nothing says where compiled code goes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_compiled_code_is_kept_apart_for_each_kind_of_processor(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        keep_compiled_code(torch.device("cpu"))
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    assert folders[0] != folders[1]
    for folder in folders:
        assert folder.is_dir()
        assert cache in folder.parents
        assert torch.__version__ in str(folder)


def test_compiled_code_goes_where_the_user_says_or_where_torch_puts_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    keep_compiled_code(torch.device("cpu"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")
    keep_compiled_code(torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/else"
    assert not list(cache.iterdir())


def test_what_one_start_compiled_the_next_one_finds(cache: Path) -> None:
    program = (
        "import torch\n"
        "from beit_dist.engine.compiled import keep_compiled_code\n"
        "keep_compiled_code(torch.device('cpu'))\n"
        "compiled = torch.compile(lambda x: x.sin() + 1)\n"
        "assert torch.allclose(compiled(torch.ones(5)), torch.ones(5).sin() + 1)\n"
        "from torch._dynamo.utils import counters\n"
        "print(counters['inductor']['fxgraph_cache_hit'])\n"
    )
    hits = [subprocess.check_output([sys.executable, "-c", program], text=True).strip() for _ in range(2)]
    assert hits == ["0", "1"]
