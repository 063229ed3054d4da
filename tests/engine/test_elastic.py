"""A run goes on at other stages and numbers of ranks: the same state to the last bit, the same data to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from beit_dist.errors import ConfigError
from beit_dist.train import main

pytestmark = pytest.mark.slow

TRAIN = Path(__file__).parents[2] / "beit_dist" / "train.py"
CHAIN = [(1, 2), (3, 1), (2, 4), (0, 2)]
"""Stage and ranks of the starts. Three ranks, which do not divide the batch, are refused before the last."""
STEPS = 7  # of each start
CONSTANT = ["loader.workers=0", "optimizer.min_lr=0.01", "optimizer.warmup_steps=0"]
# After restoring, each rank leaves what it holds, and the weights that its forward pass will use.
DUMPING = f"""\
import os, pathlib, runpy
import numpy as np
from beit_dist.engine.checkpoint.store import CheckpointStore
restore = CheckpointStore.restore
def dumping(self, saved, state):
    restore(self, saved, state)
    held = {{fragment.key: fragment.data.numpy() for fragment in state.held_fragments()}}
    forward = {{f"forward/{{name}}@0": parameter.detach().float().view(-1).numpy()
               for parameter, name in state._names.items() if parameter.numel()}}
    np.savez(f"restored-{{saved.step}}-{{self.rank}}.npz", **held, **forward)
CheckpointStore.restore = dumping
runpy.run_path({str(TRAIN)!r}, run_name='__main__')
"""


def joined(files: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[np.uint32]]:
    """The bits of whole tensors, ``role/parameter``, from fragments ``role/parameter@start``; copies agree."""
    pieces: dict[str, dict[int, NDArray[np.uint32]]] = {}
    for file in files:
        for key, values in file.items():
            name, _, start = key.rpartition("@")
            bits = np.ascontiguousarray(values).view(np.uint32)
            known = pieces.setdefault(name, {}).setdefault(int(start), bits)
            np.testing.assert_array_equal(known, bits, err_msg=key)
    whole = {}
    for name, found in pieces.items():
        end = 0
        for start in sorted(found):
            assert start == end, f"{name}: a gap or an overlap at {end}"
            end += len(found[start])
        whole[name] = np.concatenate([found[start] for start in sorted(found)])
    return whole


def stage(number: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number}, "bf16": {"enabled": True}}


def test_a_run_goes_on_at_other_stages_and_numbers_of_ranks(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = new_run("whole", stage(1), ranks=2, overrides=[*CONSTANT, f"steps={STEPS * len(CHAIN)}"])
    code, output = whole.finish()
    assert code == 0, output

    for number, (zero, ranks) in enumerate(CHAIN):
        run = new_run("run", stage(zero), ranks=ranks, overrides=[*CONSTANT, f"steps={STEPS * (number + 1)}"])
        run.entry = run.folder.parent / "dumping.py"
        run.entry.write_text(DUMPING)
        before = STEPS * number
        saved = [load_file(file) for file in run.folder.glob(f"checkpoints/step-{before:08d}.*/*.safetensors")]
        if number == len(CHAIN) - 1:
            with monkeypatch.context() as three:
                for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
                    three.setenv(name, value)
                with pytest.raises(ConfigError) as refused:
                    main(run.command()[run.command().index("--ds_config") :])
            assert "global_batch: got 16, expected a multiple of the 3 ranks" in str(refused.value)
            assert "Use global_batch=15 or 18, or 1 or 2 or 4 ranks" in str(refused.value)
        code, output = run.finish()
        assert code == 0, output
        if not number:
            continue
        assert f"resumed from step-{before:08d}" in output
        assert len(saved) == CHAIN[number - 1][1]
        dumps = [np.load(run.folder.parent / f"restored-{before}-{rank}.npz") for rank in range(ranks)]
        restored = joined([dict(dump) for dump in dumps])
        forward = {name: restored.pop(name) for name in list(restored) if name.startswith("forward/")}
        expected = joined(saved)
        assert {name.split("/")[0] for name in expected} == {"weight", "exp_avg", "exp_avg_sq"}
        assert restored.keys() == expected.keys()
        for name, bits in expected.items():
            np.testing.assert_array_equal(restored[name], bits, err_msg=name)
        assert forward or zero == 3
        for name, bits in forward.items():
            master = torch.from_numpy(expected[name.replace("forward", "weight")].view(np.float32).copy())
            assert torch.equal(master.bfloat16().float(), torch.from_numpy(bits.view(np.float32))), name

    # The batches were the same ones: samples, epochs, masks and drop-path keeps of every step, on any ranks.
    for name in ("step", "samples", "epoch", "lr", "masked", "batch"):
        assert [line[name] for line in run.lines()] == [line[name] for line in whole.lines()], name
    assert len({line["batch"] for line in run.lines()}) == STEPS * len(CHAIN)
    losses = [line["loss"] for line in whole.lines()]
    assert [line["loss"] for line in run.lines()] == pytest.approx(losses, rel=0.02)
