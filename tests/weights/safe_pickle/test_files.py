"""Files of torch.save are read to the last bit, and one that would do more than hold data runs nothing."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit_dist.errors import WeightsError
from beit_dist.weights.safe_pickle.files import read_torch_file
from beit_dist.weights.safe_pickle.machine import Inert
from beit_dist.weights.safe_pickle.tensors import Name

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
MAGIC = 0x1950A86A20F9469CFC6C


def everything() -> dict[str, Any]:
    """What checkpoints hold: weights, an optimizer's state, settings, plain values."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-3, names=["a", "b"], size=(1, 2), data=Path("data")),
        "plain": [None, True, -3, 2**70, -1.5, "é", b"\x00\xff", {1, 2}, torch.float16, torch.Size([2, 3])],
        "half": torch.randn(3, 4).half().t()[1:],
        "bf16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "row": model[0].weight.data[1],
    }


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert got.dtype is expected.dtype
        assert torch.equal(got, expected.detach())
        assert not got.requires_grad
    elif isinstance(expected, dict):
        assert type(got) is dict
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, argparse.Namespace):
        assert got.kind == Name("argparse", "Namespace")
        state = dict(got.state)
        path = state.pop("data")
        assert (path.kind.name, path.arguments) == ("PosixPath", ("data",))
        assert state == {k: v for k, v in vars(expected).items() if k != "data"}
    else:
        assert got == expected


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read_to_the_last_bit(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path, saved = tmp_path / "a.pth", everything()
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    got = read_torch_file(path)
    assert_same(got, saved)
    got["model"]["0.weight"][1, 0] = 7.0
    assert got["row"][0] == 7.0  # tensors share memory where they did


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_numpys_numbers_become_pythons(tmp_path: Path, zipped: bool, protocol: int, module: str) -> None:
    kinds = (np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_)
    saved = {kind.__name__: kind(1.5 if issubclass(kind, np.floating) else 1) for kind in kinds}
    content = pickle.dumps([saved, np.float64(1e-3), np.float64(-2.5)], protocol)
    name, other = b"numpy._core.multiarray", f"{module}.multiarray".encode()  # as NumPy 2 and 1 call it
    assert name in content
    if protocol == 4:
        name, other = bytes([len(name)]) + name, bytes([len(other)]) + other
        content = content[:2] + content[11:]  # without the frame, whose length would be another
    content = content.replace(name, other)
    path = tmp_path / "a.pth"
    if zipped:
        zipped_pickle(path, content)
    else:
        path.write_bytes(legacy([MAGIC, 1001, {"little_endian": True}, content, []]))
    numbers, *rest = read_torch_file(path)
    assert rest == [1e-3, -2.5]
    assert numbers == saved
    assert [type(value) for value in numbers.values()] == [float, float, float, int, int, bool]


@FORMATS
def test_modules_are_read_as_inert_objects_if_they_are_admitted(tmp_path: Path, zipped: bool) -> None:
    path, module = tmp_path / "module.pkl", torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save(module, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"it asks for 'torch\.nn\.modules\.container\.Sequential'"):
        read_torch_file(path)
    asked: set[tuple[str, str]] = set()

    def admit(module: str, name: str) -> bool:
        asked.add((module, name))
        return module.startswith("torch.nn.modules.")

    got = read_torch_file(path, admit=admit)
    assert type(got) is Inert
    assert got.kind.name == "Sequential"
    linear = got.state["_modules"]["0"]
    assert_same(linear.state["_parameters"], dict(module[0].named_parameters()))
    assert asked == {("torch.nn.modules.container", "Sequential"), ("torch.nn.modules.linear", "Linear")}


# Hostile files


class Calls:
    """Pickles as a call of ``function``, and runs it where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


class SetsState:
    """Its attributes are given to a method of its class."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["marker"]).touch()


def touch(marker: str) -> str:
    return f"exec({f'open({marker!r}, chr(119)).close()'!r})"


HOSTILE: dict[str, Callable[[str], Any]] = {
    "os.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "eval": lambda marker: Calls(eval, touch(marker)),
    "getattr": lambda marker: Calls(getattr, Calls(__import__, "os"), "system"),
    "in arguments": lambda marker: Calls(torch.Size, Calls(eval, touch(marker))),
    "through torch": lambda marker: Calls(
        torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (touch(marker),), {}
    ),
    "setstate": SetsState,
    "open": lambda marker: Calls(open, marker, "w"),
    "attributes of a tensor": lambda marker: Calls(
        torch._utils._rebuild_parameter, torch.ones(1), False, {}, state={"a": 1}
    ),
}
"""What creates the file ``marker`` when it is unpickled, or would be a step on the way."""


@FORMATS
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, name: str, zipped: bool) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "ran"
    torch.save(
        {"model": {"weight": [HOSTILE[name](str(marker))]}, "epoch": 1},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(WeightsError, match=r"a\.pth: it asks .*nothing of it was run"):
        read_torch_file(path)
    assert not marker.exists()


def zipped_pickle(path: Path, content: bytes, **entries: bytes) -> Path:
    """An archive as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, values in entries.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", values)
    return path


def stored(kind: bytes = b"FloatStorage", key: bytes = b"0", count: int = 2) -> bytes:
    """Instructions that lay a storage on the stack."""
    words = b"X" + struct.pack("<I", 7) + b"storage" + b"ctorch\n" + kind + b"\n"
    words += b"X" + struct.pack("<I", len(key)) + key + b"X\x03\x00\x00\x00cpu"
    return b"(" + words + pickle.LONG1 + b"\x08" + struct.pack("<q", count) + b"tQ"


def tensor(storage: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one tensor."""
    numbers = [pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride, False)]
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(numbers) + b"}tR."


def number(code: bytes, order: bytes, size: int) -> bytes:
    """A pickle of a NumPy number."""
    kind = b"cnumpy\ndtype\nU" + bytes([len(code)]) + code + b"\x89\x88\x87R(K\x03U\x01" + order + b"tb"
    return b"\x80\x02cnumpy._core.multiarray\nscalar\n" + kind + b"C" + bytes([size]) * (1 + size) + b"\x86R."


LONG_TEXT = b"X" + struct.pack("<I", 99999) + b"a" * 99999
FLOATS = struct.pack("<2f", 1.0, 2.0)


def test_the_pickles_below_would_be_right_but_for_their_fault(tmp_path: Path) -> None:
    path = zipped_pickle(tmp_path / "a.pth", tensor(stored(), 0, (2,), (1,)), _0=FLOATS)
    assert read_torch_file(path).tolist() == [1.0, 2.0]


def test_a_value_with_a_stride_of_its_own_has_bytes_too(tmp_path: Path) -> None:
    path = zipped_pickle(tmp_path / "a.pth", tensor(stored(), 1, (1, 1), (83, 83)), _0=FLOATS)
    value = read_torch_file(path)
    assert value.tolist() == [[2.0]]
    assert value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == FLOATS[4:]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(tensor(stored(count=3), 0, (2,), (1,)), "has 8 bytes, but claims 3", id="overlong storage"),
        pytest.param(tensor(stored(count=2**39), 0, (2,), (1,)), "has 8 bytes, but claims", id="huge storage"),
        pytest.param(tensor(stored(count=-1), 0, (2,), (1,)), "an invalid size", id="negative storage"),
        pytest.param(tensor(stored(key=b"1"), 0, (2,), (1,)), "damaged", id="missing storage"),
        pytest.param(tensor(stored(b"Tensor"), 0, (2,), (1,)), "asks for 'torch.Tensor'", id="no storage type"),
        pytest.param(tensor(stored(), 0, (3,), (1,)), r"size \[3\]", id="past the end"),
        pytest.param(tensor(stored(), 1, (2,), (1,)), r"size \[2\]", id="past the end by offset"),
        pytest.param(tensor(stored(), 0, (2,), (2,)), r"size \[2\]", id="past the end by stride"),
        pytest.param(tensor(stored(), 1, (2,), (-1,)), "an invalid size", id="negative stride"),
        pytest.param(tensor(stored(), -1, (2,), (1,)), "an invalid size", id="negative offset"),
        pytest.param(tensor(stored(), 0, (2**39,), (0,)), "in a storage of 2 values", id="unfolds to terabytes"),
        pytest.param(tensor(stored(), 0, (1, 1), (1,)), "differ in length", id="sizes and strides"),
        pytest.param(b"\x80\x02X\x03\x00\x00\x00abcQ.", "persistent id", id="persistent id"),
        pytest.param(b"\x80\x02" + stored()[:-1] + b"}RQ.", "asks to call a tuple", id="call of a tuple"),
        pytest.param(b"cposix\nsystem\n(S'ls'\ntR.", "'posix.system'", id="protocol 0"),
        pytest.param(b"(ios\nsystem\n.", "instruction INST", id="INST"),
        pytest.param(b"\x80\x02\x82\x01.", "instruction EXT1", id="extension registry"),
        pytest.param(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'", id="STACK_GLOBAL"),
        pytest.param(b"\x80\x04\x8c\x08builtins\x8c\x0bset.__doc__\x93.", "set.__doc__", id="dotted name"),
        pytest.param(b"\x80\x02cargparse\nNamespace\n}b.", "attributes of a Name", id="attributes of a class"),
        pytest.param(b"\x80\x02}]]s.", "not a plain value", id="list as key"),
        pytest.param(b"\x80\x02]b.", "damaged", id="empty stack"),
        pytest.param(b"\x80\x02h\x07.", "damaged", id="unknown memo"),
        pytest.param(b"\x80\x02X\xff\xff\xff\x7fabc", "damaged", id="text without end"),
        pytest.param(b"\x80\x02]", "damaged", id="no end"),
        pytest.param(b"\x80\x02" + LONG_TEXT + LONG_TEXT + b"\x93.", "nothing of it was run", id="long name"),
        pytest.param(stored(key=b"k" * 99999) + b".", "damaged", id="long key"),
        pytest.param(stored(key=b"0\x1b[31m") + b".", "damaged", id="key that steers a terminal"),
        pytest.param(
            stored(key=b"\x1b[31m") + stored(b"HalfStorage", key=b"\x1b[31m") + b".",
            r"storage \?\[31m has 4 bytes",
            id="key of an entry that steers a terminal",
        ),
        pytest.param(number(b"O8", b"<", 8), "something other than numbers", id="NumPy's objects"),
        pytest.param(number(b"V8", b"<", 8), "something other than numbers", id="NumPy's structures"),
        pytest.param(number(b"f8", b">", 8), "big-endian", id="big-endian number"),
        pytest.param(number(b"f8", b"<", 4), "damaged", id="number cut short"),
        pytest.param(b"\x80\x02cnumpy._core.multiarray\nscalar\n]C\x01a\x86R.", "type and bytes", id="no type"),
        pytest.param(
            b"\x80\x02ccollections\nOrderedDict\n(cos\nsystem\ntR.", "'os.system'", id="call in arguments"
        ),
    ],
)
def test_a_malformed_pickle_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = zipped_pickle(tmp_path / "a.pth", content, **{"_0": FLOATS, "_\x1b[31m": FLOATS[:4]})
    with pytest.raises(WeightsError, match=said) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@FORMATS
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    buffer = io.BytesIO()
    saved = {"a": torch.arange(5.0), "b": [1, "x"]}
    torch.save(saved, buffer, _use_new_zipfile_serialization=zipped)
    content, path = buffer.getvalue(), tmp_path / "cut.pth"
    for length in (0, 1, 3, 4, 30, *range(0, len(content), 17), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            read_torch_file(path)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    values = torch.arange(50.0)
    torch.save({"a": values}, path)
    content = bytearray(path.read_bytes())
    place = content.index(values.numpy().tobytes())
    content[place + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged file .*CRC"):
        read_torch_file(path)


def legacy(pickles: list[Any], rest: bytes = b"") -> bytes:
    return b"".join(p if isinstance(p, bytes) else pickle.dumps(p, 2) for p in pickles) + rest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (legacy([MAGIC, 1001, {"little_endian": False}]), "big-endian"),
        (legacy([MAGIC, 1001, {"little_endian": True}, stored(count=2**38) + b".", ["0"]]), "more bytes than the"),
        (
            legacy([MAGIC, 1001, {"little_endian": True}, stored() + b".", ["1"]], FLOATS),
            "do not belong to its tensors",
        ),
        (
            legacy([MAGIC, 1001, {"little_endian": True}, stored() + b".", ["0"]], struct.pack("<q", 9) + FLOATS),
            "storage 0 has 9 values",
        ),
        (legacy([1, 2, {}]), "expected a file written by torch.save"),
        (b"\x89HDF\r\n\x1a\n", "damaged file"),
    ],
)
def test_a_wrong_legacy_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        read_torch_file(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 100_000 + b".")
    with pytest.raises(WeightsError, match="compressed"):
        read_torch_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth: got no file"):
        read_torch_file(tmp_path / "none.pth")
