"""A start that compiles nothing does not load PyTorch's compiler, and its updates are the same."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """\
import sys
import torch
from beit_dist.engine.compiled import spare_compiler

def updated():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        layer(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.state[layer.weight]["exp_avg"].requires_grad
    optimizer.load_state_dict(optimizer.state_dict())
    return layer.weight

spare_compiler()
spare_compiler()
spared = updated()
assert "torch._dynamo" not in sys.modules, "the compiler was loaded"
del torch.optim.AdamW.step
assert torch.equal(updated(), spared)
assert "torch._dynamo" in sys.modules, "there is nothing to spare any more"
"""


def test_updates_without_the_compiler_are_equal() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
