"""What ranks on processors exchange: two of them, through gloo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from beit_dist.engine.ranks.processors import gather_in_place, is_left_to_us, sum_in_place

RANKS = 2


def rank_of(rank: int, folder: str) -> None:
    """One of the ranks; what it has in the end is saved in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save({"gradients": averaged(rank), **gathered(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def averaged(rank: int) -> list[torch.Tensor]:
    flat = [
        torch.tensor([1.0, 2.0**-9]) if rank == 0 else torch.tensor([2.0**-9, 1.0]),
        torch.full((3,), rank + 1.0),
    ]
    optimizer = SimpleNamespace(get_grads_for_reduction=lambda: (flat, {}))
    engine = SimpleNamespace(optimizer=optimizer)
    sum_in_place(engine)
    engine.buffered_allreduce_fallback(grads=None, elements_per_buffer=5)
    return flat


def gathered(rank: int) -> dict[str, torch.Tensor]:
    backend = SimpleNamespace(all_gather_function=dist.all_gather_into_tensor)
    gather_in_place(backend)
    within = torch.zeros(6, dtype=torch.bfloat16)
    within[3 * rank : 3 * rank + 3] = torch.arange(3) + 10 * rank  # a part that lies where it is gathered
    backend.all_gather_function(output_tensor=within, input_tensor=within[3 * rank : 3 * rank + 3])
    apart, later = torch.zeros(2, 2), torch.zeros(4)
    backend.all_gather_function(apart, torch.full((1, 2), rank + 1.0), group=dist.group.WORLD)
    backend.all_gather_function(later, torch.full((2,), rank + 1.0), async_op=True).wait()
    return {"within": within, "apart": apart, "later": later}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_of, (str(folder),), RANKS)  # type: ignore[no-untyped-call]
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(RANKS)]


def test_gradients_are_averaged_in_the_type_that_they_are_kept_in(found: list[dict[str, Any]]) -> None:
    """1 and 2⁻⁹ are bf16, their sum is not: an exchange in bf16 would round it to 1."""
    for each in found:
        assert each["gradients"][0].tolist() == [(1 + 2.0**-9) / 2] * 2
        assert each["gradients"][1].tolist() == [1.5] * 3


def test_parts_are_gathered_whether_they_lie_in_the_whole_or_not(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["within"].tolist() == [0, 1, 2, 10, 11, 12]
        assert each["apart"].tolist() == [[1, 1], [2, 2]]
        assert each["later"].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("said", ["communication_data_type", "prescale_gradients", "gradient_predivide_factor"])
def test_who_says_how_to_exchange_is_obeyed(said: str) -> None:
    assert is_left_to_us({"bf16": {"enabled": True}})
    assert not is_left_to_us({said: "bf16"})
