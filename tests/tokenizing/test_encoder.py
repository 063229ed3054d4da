"""The encoder: one compiled graph for every batch, tokens that depend on nothing but their image."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import ConfigError, TokenizerError
from beit_dist.models.dvae import DVAE
from beit_dist.tokenizing import encoder as encoders
from beit_dist.tokenizing.encoder import DVAEEncoder, check_compiles, compiles_by_default


def dvae() -> DVAE:
    config = DVAEConfig(vocabulary=32, hidden=8, blocks_per_group=1, decoder_input=0)
    return DVAE(config, seed=1).requires_grad_(False).eval()


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


class Graphs:
    """Stands for Inductor: runs what it is given, and counts it."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.made += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    torch.compiler.reset()
    backend = Graphs()
    monkeypatch.setattr(encoders.torch, "compile", functools.partial(torch.compile, backend=backend))
    return backend


def test_warming_up_compiles_and_nothing_is_compiled_later(graphs: Graphs) -> None:
    """The job encodes in another thread than it warms up in, and pads its last batch."""
    encoder, plain, batch, made = DVAEEncoder(dvae(), "fp32", compiled=True), DVAEEncoder(dvae(), "fp32"), 4, []
    encoder.warm_up(batch, 32)
    assert graphs.made == 1
    padded = images(batch)
    padded[1:] = 0

    def work() -> None:
        made.extend(encoder(one) for one in (images(batch), images(batch, 1), padded))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert graphs.made == 1
    for tokens, given in zip(made, (images(batch), images(batch, 1), padded), strict=True):
        assert np.array_equal(tokens, plain(given))
    assert encoder(images(2)).shape == (2, 4, 4)
    assert graphs.made == 2, "another shape is another graph: what is counted are graphs"


def test_what_is_not_asked_for_is_not_compiled(graphs: Graphs) -> None:
    DVAEEncoder(dvae(), "fp32").warm_up(2, 32)
    assert graphs.made == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_tokens_are_those_of_plain_pytorch(precision: Any) -> None:
    torch.compiler.reset()
    given = images(8)
    compiled, plain = DVAEEncoder(dvae(), precision, compiled=True)(given), DVAEEncoder(dvae(), precision)(given)
    assert len(np.unique(plain)) > 2
    assert np.mean(compiled == plain) > 0.98


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_do_not_depend_on_what_else_is_in_the_batch(precision: Any) -> None:
    encoder = DVAEEncoder(dvae(), precision)
    padded, full = np.zeros((4, 32, 32, 3), np.uint8), images(4, 5)
    padded[:2] = full[:2]
    assert np.array_equal(encoder(padded)[:2], encoder(full)[:2])


def test_logits_that_are_not_finite_are_refused_compiled_or_not(graphs: Graphs) -> None:
    for compiled in (False, True):
        model = dvae()
        model.encoder.blocks[-1][1].b[3] = torch.nan  # type: ignore[index]
        with pytest.raises(TokenizerError, match="not finite in fp32"):
            DVAEEncoder(model, "fp32", compiled=compiled)(images(1))


def test_a_gpu_compiles_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "check_compiler", lambda device: None)
    assert compiles_by_default(torch.device("cuda"))
    assert not compiles_by_default(torch.device("cpu"))

    def missing(device: str) -> None:
        raise ConfigError("compile", True, "a C compiler", "Install one, or set compile=false.")

    monkeypatch.setattr(encoders, "check_compiler", missing)
    assert not compiles_by_default(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--compile: got True, expected a C compiler\. .*use --no-compile"):
        check_compiles(torch.device("cuda"))
