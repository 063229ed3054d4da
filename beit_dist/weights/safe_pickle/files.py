"""Read what ``torch.save`` wrote without running what is in it.

A pickle is a program: loading one calls whatever it names. Here a small interpreter of our own walks over its
instructions and calls nothing that the file names. It knows tensors, containers and plain values; a class that
the caller admits becomes an :class:`Inert`, which holds the arguments and attributes and has no behaviour. Any
other name, and any instruction that is not needed for these, refuses the file.

``torch.load(weights_only=True)`` is near to this and was tried (torch 2.13, with inert classes admitted by
``safe_globals``). It calls torch's functions with the file's arguments as often as the file asks, and accepts any
key: 70 kB filled 4 GB, and 3 MB of keys with one hash took 20 s, twice as many four times as long. A check before
it does not help, as two readers of an archive need not see the same pickle in it. It compares no crc, and reads no
whole module of the old format. Before torch 2.10 a file can make it write outside its memory (CVE-2026-24747).

Two formats: zip archives (torch 1.6 and newer), and before that a row of pickles followed by the storages.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from beit_dist.errors import WeightsError
from beit_dist.weights.safe_pickle.machine import Admit, Machine
from beit_dist.weights.safe_pickle.tensors import RefusalError, Storages

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_LONGEST_LINE = 400


def read_torch_file(path: str | Path, *, admit: Admit = lambda module, name: False) -> Any:
    """The object in a file of ``torch.save``: dicts, lists, tuples, sets, plain values, tensors, :class:`Inert`.

    Tensors are on the CPU, need no gradient, and share memory where they did. An ``OrderedDict`` becomes a dict.
    ``argparse.Namespace`` and paths are always admitted.

    Args:
        path: the file.
        admit: which further classes may be in it.

    Raises:
        WeightsError: the file is missing, damaged, of another format, or would do more than hold data.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return (_read_zip if zipped else _read_legacy)(file, size, admit)
    except FileNotFoundError:
        raise WeightsError(f"{path}: got no file, expected one written by torch.save") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RefusalError as refusal:
        raise WeightsError(f"{path}: {_line(refusal)}") from None
    except (ValueError, LookupError, TypeError, EOFError, ArithmeticError, RuntimeError, NotImplementedError,
            MemoryError, struct.error, zipfile.BadZipFile) as error:  # fmt: skip
        raise WeightsError(
            f"{path}: got a damaged file ({_line(error)}), expected one written by torch.save"
        ) from None


def _line(error: Exception) -> str:
    """What an error says in one short line of a terminal, whatever the file has put into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return (
        shown
        if len(shown) <= _LONGEST_LINE
        else f"{shown[: _LONGEST_LINE // 2]} ... {shown[-_LONGEST_LINE // 2 :]}"
    )


def _read_zip(file: BinaryIO, size: int, admit: Admit) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise RefusalError("two entries of the archive have the same name")
        # Stored as they are, and together no more than the file: nothing here unfolds to something huge.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise RefusalError("got a compressed archive, expected one written by torch.save")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise RefusalError("its entries claim more bytes than the file has")
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or pickles[0].startswith(("/", "./", "../")):
            raise RefusalError("got an archive without a data.pkl of its own, expected one written by torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        order = folder + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise RefusalError("got big-endian values, expected little-endian ones")

        def load(key: str, dtype: torch.dtype, count: int) -> Tensor:
            entry = entries[f"{folder}data/{key}"]
            if entry.file_size != count * dtype.itemsize:
                raise RefusalError(f"storage {key} has {entry.file_size} bytes, but claims {count} of {dtype}")
            values = torch.empty(count, dtype=dtype)
            with archive.open(entry) as content:
                _fill(values, content)
                content.read(1)  # the end, where the crc is compared
            return values

        return Machine(io.BytesIO(archive.read(pickles[0])), Storages(load), admit).run()


def _read_legacy(whole: BinaryIO, size: int, admit: Admit) -> Any:
    file: Any = _Bounded(whole, size)
    magic, version, system = (Machine(file, None, admit).run() for _ in range(3))
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION or not isinstance(system, dict):
        raise RefusalError("got something else, expected a file written by torch.save")
    if system.get("little_endian") is not True:
        raise RefusalError("got big-endian values, expected little-endian ones")
    left = size

    def reserve(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal left
        left -= count * dtype.itemsize
        if left < 0:
            raise RefusalError("its storages claim more bytes than the file has")
        return torch.empty(count, dtype=dtype)

    storages = Storages(reserve)
    found = Machine(file, storages, admit).run()
    keys = Machine(file, None, admit).run()
    if not isinstance(keys, list) or set(keys) != set(storages.whole) or len(keys) != len(storages.whole):
        raise RefusalError("the storages that follow do not belong to its tensors")
    for key in keys:
        values = storages.whole[key].values
        (count,) = struct.unpack("<q", file.read(8))
        if count != len(values):
            raise RefusalError(f"storage {key} has {count} values, but its tensors need {len(values)}")
        _fill(values, file)
    return found


class _Bounded:
    """A file that is never asked for more than it has: Python reserves what is asked for before it reads."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.tell, self.readinto, self.readline = file.tell, file.readinto, file.readline  # type: ignore[attr-defined]

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, max(0, self._size - self._file.tell())))


def _fill(values: Tensor, file: Any) -> None:
    """Read exactly the bytes of ``values`` from ``file``, and make sure that they are values of its type."""
    view = values.view(torch.uint8).numpy().data if len(values) else memoryview(b"")
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + (16 << 20)])
        if not got:
            raise RefusalError(f"it ends inside a storage ({done} of {len(view)} bytes)")
        done += got
    if values.dtype is torch.bool and len(view):
        values.copy_(values.view(torch.uint8) != 0)
