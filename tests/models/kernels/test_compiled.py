"""The kernels as Triton compiles them for GPUs: no GPU is needed for that, and the interpreter accepts more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {80: 163, 90: 227}
"""KiB that a program may use (CUDA C++ Programming Guide, table of compute capabilities)."""
TENSORS = {"qkv", "bias", "out", "grad", "grad_qkv"}
SUMS = {"lse", "delta", "sums"}
ANY = {"N", "H", "B", "chunk", "scale"}
"""Numbers that no power of two divides."""


def main() -> None:
    """Print, as JSON, what each kernel takes of a GPU; in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from beit_dist.models.kernels import programs
    from beit_dist.models.kernels.tiles import tiles_of

    def compiled(kernel: Any, tile: Any, capability: int, dtype: str, **given: Any) -> dict[str, Any]:
        constants = {**given, "ROWS": tile.rows, "COLUMNS": tile.columns}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature, values, attributes = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], values[(place,)] = "constexpr", constants[name]
                continue
            signature[name] = f"*{dtype}" if name in TENSORS else "*fp32" if name in SUMS else "i32"
            if name not in ANY:
                attributes[(place,)] = [["tt.divisibility", 16]]
        signature["scale"] = "fp32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return {"shared": binary.metadata.shared, "spilled": local_memory(binary.asm["ptx"], capability)}

    def local_memory(ptx: str, capability: int) -> int:
        """Bytes that a thread stores of its registers."""
        from triton.backends.nvidia.compiler import get_ptxas

        path = Path(os.environ["TRITON_CACHE_DIR"], "kernel.ptx")
        path.write_text(ptx)
        architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(path), "-o", f"{path}.out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return int(said.split(" bytes spill stores")[0].split()[-1])

    found = []
    kernels = {
        "forward": "forward",
        "queries": "query_gradients",
        "keys": "key_gradients",
        "bias": "bias_gradients",
    }
    for capability, dtype, width in ((90, "bf16", 64), (90, "bf16", 128), (80, "bf16", 64), (90, "fp16", 32)):
        for field, name in kernels.items():
            tile = getattr(tiles_of(width, 2), field)
            taken = compiled(getattr(programs, name), tile, capability, dtype, D=width, WIDE=width, BIASED=True)
            found.append({"kernel": name, "capability": capability, "dtype": dtype, "width": width, **taken})
    print(json.dumps(found))


def test_they_compile_into_registers_and_fit_into_shared_memory(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 16
    for taken in found:
        assert taken["spilled"] == 0, taken
        assert taken["shared"] <= SHARED_MEMORY[taken["capability"]] * 1024, taken


if __name__ == "__main__":
    main()
