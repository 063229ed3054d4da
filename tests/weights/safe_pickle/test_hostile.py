"""No file of weights runs anything, writes anything, or takes more memory and time than its length allows."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_dist.config.model import ModelConfig
from beit_dist.errors import UserError, WeightsError
from beit_dist.weights.dalle import read_weights
from beit_dist.weights.foreign import read_foreign
from beit_dist.weights.safe_pickle.files import read_torch_file

MAGIC = 0x1950A86A20F9469CFC6C


def as_zip(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", struct.pack("<2f", 1, 2))


def as_legacy(path: Path, content: bytes) -> None:
    head = [MAGIC, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + content)


def as_first_pickle(path: Path, content: bytes) -> None:
    path.write_bytes(content)


FORMS = pytest.mark.parametrize("form", [as_zip, as_legacy, as_first_pickle], ids=lambda form: form.__name__)


class Runs:
    """Touches ``marker`` where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


class Created:
    """The same by a class with arguments by name: NEWOBJ_EX of protocol 4."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __new__(cls, *args: Any, marker: str | Path = "") -> Any:
        if isinstance(marker, str) and marker:
            Path(marker).mkdir()
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (copyreg.__newobj_ex__, (Created, (), {"marker": str(self.marker)}))


@FORMS
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [Runs, Created])
def test_every_protocol_of_a_call_is_refused(
    tmp_path: Path, form: Callable[..., None], protocol: int, kind: type
) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "ran"
    content = pickle.dumps({"model": [kind(marker)]}, protocol)
    form(path, content)
    for read in (read_torch_file, read_weights):
        with pytest.raises(UserError, match=r"a\.pth: (it asks for|got the instruction (NEWOBJ_EX|DICT))"):
            read(path)
    assert not marker.exists()
    if kind is Runs:
        pickle.loads(content)
        assert marker.exists(), "the pickle is harmless, so the test shows nothing"


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


@FORMS
@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"(" + text("x") + b"ios\nsystem\n.", "INST", id="INST"),
        pytest.param(b"(cos\nsystem\n" + text("x") + b"o.", "'os.system'", id="OBJ of a function"),
        pytest.param(b"(cargparse\nNamespace\no.", "instruction OBJ", id="OBJ"),
        pytest.param(b"\x80\x04cargparse\nNamespace\n)}\x92.", "instruction NEWOBJ_EX", id="NEWOBJ_EX"),
        pytest.param(text("os.system") + b"(" + text("x") + b"tR.", "asks to call a str", id="call of a text"),
        pytest.param(b"cargparse\nNamespace\n}R.", "asks to call a Name", id="arguments that are no tuple"),
        pytest.param(b"]}b.", "set attributes of a list", id="BUILD of a list"),
        pytest.param(b"ctorch\nFloatStorage\n)R.", "'torch.FloatStorage'", id="call of a storage class"),
        pytest.param(
            b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR.",
            "'copyreg._reconstructor'",
            id="old object",
        ),
        pytest.param(b"ccopyreg\n__newobj__\n.", "'copyreg.__newobj__'", id="newobj by name"),
        pytest.param(b"\x80\x02cargparse\nNamespace\n\x81.", "its stack is empty", id="NEWOBJ on an empty stack"),
        pytest.param(b"cbuiltins\ngetattr\n.", "'builtins.getattr'", id="getattr"),
        pytest.param(b"c__builtin__\nexec\n.", "'builtins.exec'", id="Python 2's name"),
        pytest.param(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__", id="dotted name"),
        pytest.param(b"ctorch\nload\n.", "'torch.load'", id="a loader in the file"),
        pytest.param(b"ctorch.hub\nload\n.", "'torch.hub.load'", id="a downloader in the file"),
        pytest.param(b"Pposix.system\n.", "instruction PERSID", id="persistent id as text"),
        pytest.param(b"\x80\x05\x97.", "NEXT_BUFFER", id="out-of-band buffer"),
        pytest.param(b"\x80\x02\x84\xff\xff\xff\x7f.", "EXT4", id="extension registry"),
        pytest.param(b"\x80\xff.", "damaged|expected a file written by torch.save", id="unknown protocol"),
    ],
)
def test_every_other_way_to_run_something_is_refused(
    tmp_path: Path, form: Callable[..., None], content: bytes, said: str
) -> None:
    form(tmp_path / "a.pth", content)
    with pytest.raises(WeightsError, match=said) as caught:
        read_torch_file(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def persistent(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"tQ."


FLOAT, COUNT = b"ctorch\nFloatStorage\n", b"K\x02"


@pytest.mark.parametrize("form", [as_zip, as_legacy], ids=lambda form: form.__name__)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (persistent(text("storage"), FLOAT, text("../../../etc/passwd"), text("cpu"), COUNT), "damaged"),
        (persistent(text("storage"), FLOAT, text("/etc/passwd"), text("cpu"), COUNT), "damaged"),
        (persistent(text("storage"), FLOAT, b"]", text("cpu"), COUNT), "key is not text"),
        (persistent(text("storage"), text("os.system"), text("0"), text("cpu"), COUNT), "storage of type str"),
        (persistent(text("file"), text("/etc/passwd"), b"NNN"), "is not a storage"),
        (persistent(text("module"), text("os"), text("a.py"), text("import os")), None),
    ],
    ids=["path", "absolute path", "list as key", "text as type", "other kind", "module of a text"],
)
def test_a_persistent_id_reaches_nothing_outside_the_file(
    tmp_path: Path, form: Callable[..., None], content: bytes, said: str | None
) -> None:
    form(tmp_path / "a.pth", content)
    if said or form is as_legacy:  # a legacy file names its storages behind its pickle
        with pytest.raises(WeightsError, match=said):
            read_torch_file(tmp_path / "a.pth")
    else:
        assert read_torch_file(tmp_path / "a.pth") == "os"  # a text, and no module


# Bombs


def doubled(levels: int) -> bytes:
    """A list of two lists of two lists ...: 2^levels of them for whoever walks through it or prints it."""
    content, last = b"]q\x000", 0
    for level in range(1, levels + 1):
        content += b"]q" + bytes([level]) + b"(h" + bytes([last]) + b"h" + bytes([last]) + b"e0"
        last = level
    return content + b"h" + bytes([last])


def copies(call: bytes, arguments: bytes, times: int) -> bytes:
    """The same arguments, kept in the memo, given to a call again and again."""
    return b"](" + call + b"q\xf0" + arguments + b"q\xf1" + b"h\xf0h\xf1R" * times + b"e."


LONG = b"](" + b"K\x01" * 20_000 + b"e"
BOMBS = {
    "printed type": persistent(text("storage"), doubled(90), text("0"), text("cpu"), COUNT),
    "printed device": b"ctorch\ndevice\n(" + doubled(90) + b"tR.",
    "printed part": b"("
    + text("storage")
    + FLOAT
    + text("0")
    + text("cpu")
    + COUNT
    + b"("
    + doubled(90)
    + b"K\0K\1ttQ.",
    "hashed key": b"}(" + doubled(90) + b"tK\x01s.",
    "sets": copies(b"cbuiltins\nset\n", b"(" + LONG + b"t", 5_000),
    "ordered dicts": copies(b"ccollections\nOrderedDict\n", b"(](" + b"K\x01K\x02\x86" * 9_000 + b"et", 5_000),
    "sizes": copies(b"ctorch\nSize\n", b"((" + b"K\x01" * 20_000 + b"tt", 5_000),
    "bytes": copies(b"c_codecs\nencode\n", b"(" + text("x" * 40_000) + text("latin1") + b"t", 5_000),
    "storage of 2^60 values": persistent(
        text("storage"), FLOAT, text("0"), text("cpu"), b"\x8a\x08" + struct.pack("<q", 2**60)
    ),
    "storage of 2^39 values": persistent(
        text("storage"), FLOAT, text("0"), text("cpu"), b"\x8a\x08" + struct.pack("<q", 2**39)
    ),
    "storage of 2^99 values": persistent(
        text("storage"), FLOAT, text("0"), text("cpu"), b"\x8a\x0d" + b"\x00" * 12 + b"\x08"
    ),
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "text of 2^31": b"X" + struct.pack("<I", 2**31 - 1) + b"abc.",
    "integer of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "integer of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].",
}
"""Short files that would fill memory, or never end, if they were read as they ask for."""
COPIED = {"sets", "ordered dicts", "sizes", "bytes"}


@FORMS
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_go_off(tmp_path: Path, form: Callable[..., None], name: str) -> None:
    form(tmp_path / "a.pth", BOMBS[name])
    tracemalloc.start()
    try:
        if name.startswith("frame") and form is as_zip:  # a hint without a meaning
            assert read_torch_file(tmp_path / "a.pth") == []
        else:
            with pytest.raises(WeightsError) as caught:
                read_torch_file(tmp_path / "a.pth")
            assert len(str(caught.value)) < 1000
            assert ("unfold" in str(caught.value)) == (name in COPIED)
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


def test_nested_lists_are_read_without_walking_through_them(tmp_path: Path) -> None:
    as_zip(tmp_path / "a.pth", doubled(90) + b".")
    found = read_torch_file(tmp_path / "a.pth")
    assert found[0] is found[1]
    with pytest.raises(UserError, match="expected the weights of DALL-E"):
        read_weights(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="expected a state dict"):
        read_foreign(tmp_path / "a.pth", ModelConfig())


@pytest.mark.parametrize(
    "key",
    [2**61 - 1, -(2**60), (-1, -2), (1, "a"), ((),), tuple("abcdefghi")],
    ids=["modulus of Python's hashes", "long", "numbers", "number and text", "nested", "long tuple"],
)
def test_keys_of_which_a_file_could_hold_thousands_with_one_hash_are_refused(tmp_path: Path, key: Any) -> None:
    for held in ({key: 1}, {key}, frozenset([key])):
        as_zip(tmp_path / "a.pth", pickle.dumps(held, 4))
        with pytest.raises(WeightsError, match="a key that is not a plain value"):
            read_torch_file(tmp_path / "a.pth")
    usual = {2**60 - 1: 1, -1: 2, 0.5: 3, None: 4, b"a": 5, ("a", "b"): 6, True: 7}
    as_zip(tmp_path / "a.pth", pickle.dumps(usual, 4))
    assert read_torch_file(tmp_path / "a.pth") == usual


def test_names_that_are_no_text_or_would_steer_a_terminal_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({10: torch.ones(1)}, path)
    readers = {
        "a state dict": lambda file: read_foreign(file, ModelConfig()),
        "the weights of DALL-E": read_weights,
    }
    for kind, read in readers.items():
        torch.save({10: torch.ones(1)}, path)
        with pytest.raises(UserError, match=f"got something else, expected {kind}"):
            read(path)
        for name in ("cls_token\n", "\x1b[31mcls_token", "\u0663.gamma_1"):
            torch.save({f"blocks.{name}": torch.ones(1)}, path)
            with pytest.raises(
                UserError, match=r"got a tensor named '.*', expected a name in plain ASCII"
            ) as caught:
                read(path)
            assert str(caught.value).isprintable()
    shell = torch.nn.Sequential(torch.nn.ReLU())
    shell._parameters[10] = torch.nn.Parameter(torch.ones(1))  # type: ignore[index]
    torch.save(shell, path)
    with pytest.raises(UserError, match="_parameters: got a name that is not text"):
        read_weights(path)


def test_a_state_inside_itself_ends(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["model"] = state
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="expected a state dict"):
        read_foreign(tmp_path / "a.pth", ModelConfig())


def test_many_views_of_one_storage_are_not_made_whole(tmp_path: Path) -> None:
    values = torch.zeros(1 << 16, dtype=torch.float16)
    torch.save({f"blocks.{number}.gamma_1": values for number in range(3000)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="more values than the files hold"):
        read_foreign(tmp_path / "a.pth", ModelConfig())


def test_modules_that_share_a_module_are_not_walked_through_again_and_again(tmp_path: Path) -> None:
    shell = torch.nn.Sequential(torch.nn.ReLU())
    for _ in range(5):
        shell, inner = torch.nn.Sequential(), shell
        shell._modules.update({str(number): inner for number in range(300)})
    torch.save(shell, tmp_path / "a.pkl")
    with pytest.raises(UserError, match="expected a module of DALL-E's"):
        read_weights(tmp_path / "a.pkl")
    deep = torch.nn.Sequential()
    for _ in range(90):
        deep = torch.nn.Sequential(deep)
    torch.save(deep, tmp_path / "deep.pkl")
    with pytest.raises(UserError, match="expected a module of DALL-E's"):
        read_weights(tmp_path / "deep.pkl")


# Archives


@pytest.mark.parametrize(
    "name", ["../data.pkl", "/data.pkl", "..\\data.pkl", "a/../../data.pkl", "archive/../data.pkl"]
)
def test_names_in_an_archive_are_no_paths(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with zipfile.ZipFile("a.pth", "w") as archive:
        archive.writestr(name, b"\x80\x02].")
        archive.writestr("../data/0", b"evil")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match=r"without a data\.pkl of its own"):
        read_torch_file("a.pth")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_claims_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    as_zip(path, b"\x80\x02].")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for size in (1 << 20, 0x7FFFFFFF, 0xFFFFFFFF):
        content[directory + 20 : directory + 28] = struct.pack("<II", size, size)  # stored and unfolded
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"claim more bytes|damaged"):
            read_torch_file(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_not_unfolded(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02].")
        archive.writestr("archive/data/0", bytes(64 << 20), method)
    assert (tmp_path / "a.pth").stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="compressed archive"):
            read_torch_file(tmp_path / "a.pth")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
