"""Every reader of safetensors refuses a file that it cannot read in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit_dist.config.model import ModelConfig
from beit_dist.errors import UserError
from beit_dist.weights.dalle import read_weights
from beit_dist.weights.foreign import read_foreign
from beit_dist.weights.tokenizer_files import load_tokenizer


def safetensors_of(dtype: str, content: bytes) -> bytes:
    header = json.dumps({"blocks.x": {"dtype": dtype, "shape": [1], "data_offsets": [0, len(content)]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content


def read_as_foreign(path: Path) -> Any:
    return read_foreign(path, ModelConfig())


@pytest.mark.parametrize("read", [read_weights, read_as_foreign, load_tokenizer])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (safetensors_of("F8_E8M0", bytes(1)), r"tensors of the type 'F8_E8M0', which is not read"),
        (safetensors_of("F32\n\n", bytes(4)), "safetensors"),
        (safetensors_of("F32", bytes(3)), "safetensors"),
        (safetensors_of("F32", bytes(4))[:-1], "safetensors"),
    ],
    ids=["type that torch's reader lacks", "type in lines", "size", "cut short"],
)
def test_safetensors_that_cannot_be_read_are_refused_in_one_line(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes, said: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
