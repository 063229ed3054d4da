"""Images of every kind of source, some of them broken, with names that files and tables have to quote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from support.archives import picture, tar_of, zip_of

ODD = "c1/a \"b\", c\nd\t'é'.jpg"
BROKEN = {"c0/cut.jpg": picture(0)[:200], "c1/empty.jpg": b"", "c1/text.jpg": b"no image at all " * 9}
REASONS = ("OSError: ", "not an image that Pillow reads", "not an image that Pillow reads")


class Mixed(NamedTuple):
    """Sources in the order in which they are named, and what they hold."""

    sources: list[str]
    good: list[tuple[str, str, str, bytes]]
    """Source, name, label and bytes of the readable images, in order."""
    bad: list[tuple[str, str]]
    """Source and name of the others, in order."""


def write_mixed(folder: Path, parquet: bytes | None = None) -> Mixed:
    """A zip, a tar with broken images, a folder with a name that is no UTF-8, and maybe a parquet file."""
    folder.mkdir()
    zipped = {f"z{number % 2}/{number}.png": picture(2 * number + 1) for number in range(12)}
    tarred = {f"c{number % 3}/{number:02d}.jpg": picture(2 * number) for number in range(20)}
    tarred = {**tarred, ODD: picture(100)}
    plain = {f"f/{number}.png": picture(201 + 2 * number) for number in range(5)}
    (folder / "b.zip").write_bytes(zip_of(zipped))
    (folder / "a.tar").write_bytes(tar_of({**BROKEN, **tarred}))
    (folder / "plain" / "f").mkdir(parents=True)
    for name, raw in plain.items():
        (folder / "plain" / name).write_bytes(raw)
    odd = picture(301)
    with open(os.fsencode(folder / "plain" / "f") + b"/\xff.png", "wb") as file:
        file.write(odd)
    sources = [str(folder / name) for name in ("b.zip", "a.tar", "plain")]
    held = [zipped, tarred, {**plain, "f/\\udcff.png": odd}]
    good = [
        (source, name, name.partition("/")[0], files[name])
        for source, files in zip(sources, held, strict=True)
        for name in sorted(files, key=lambda name: name.replace("\\udcff", "\xff").encode("latin-1", "ignore"))
    ]
    if parquet is not None:
        (folder / "rows.parquet").write_bytes(parquet)
        sources.append(str(folder / "rows.parquet"))
    return Mixed(sources, good, [(sources[1], name) for name in sorted(BROKEN)])
