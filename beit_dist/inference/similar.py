"""``beit similar``: the images nearest to some, of a file of features or of sources that are looked at now."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.files import ImageFile
from beit_dist.images.gathering import Entry
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.source import Source
from beit_dist.images.sources.folder import Folder
from beit_dist.inference.collection import Collection
from beit_dist.inference.embedded import Embedded, Row, check_same
from beit_dist.inference.embedding import Embedding
from beit_dist.inference.formats.table import told
from beit_dist.inference.nearest import Neighbour, nearest
from beit_dist.inference.reading import read
from beit_dist.storage.access import Access
from beit_dist.storage.place import is_url


class Similar(NamedTuple):
    """An image that is similar to a query."""

    neighbour: Neighbour
    row: Row
    file: ImageFile | None
    """Where it lies; None: not where its features say."""


class Answer(NamedTuple):
    """What was found."""

    similar: list[list[Similar]]
    """Of each query, the most similar first."""
    compared: int
    """Images."""
    unreadable: int
    """Images that were left out, where they were looked at now."""


def query_features(work: Embedding, queries: Sequence[str]) -> NDArray[np.float32]:
    """The features of images at paths or URLs: (Q, D).

    Raises:
        DataError: one cannot be used.
    """
    found: NDArray[np.float32] = work.make([work.model.prepare(query) for query in queries])[0]
    return found


def similar_in_file(
    work: Embedding, queries: NDArray[np.float32], embedded: Embedded, top: int, access: Access
) -> Answer:
    """The images nearest to queries (Q, D) in a file of features of the same model, layer and token.

    Raises:
        ConfigError: the features are of another model, layer or token.
    """
    check_same(embedded, work)
    (column,) = work.columns()
    facts = embedded.facts
    tokens = ("mean", "class") if facts["token"] == "both" else (facts["token"],)
    known = [f"{token}_{layer}" for layer in facts["layers"] for token in tokens]
    if column.title not in known:
        expected = f"features {column.title} (it has {', '.join(known)})"
        raise ConfigError("--embedded", str(embedded), expected, "Choose with --layer and --token.")
    found = nearest(queries, embedded.vectors(column.title), top)
    numbers = sorted({neighbour.row for each in found for neighbour in each})
    rows = dict(zip(numbers, embedded.rows(numbers), strict=True))
    files = _files(list(rows.values()), access)
    similar = [[Similar(one, rows[one.row], files.get(rows[one.row])) for one in each] for each in found]
    return Answer(similar, embedded.metadata["images"], 0)


def similar_in_images(
    work: Embedding,
    queries: NDArray[np.float32],
    images: Collection,
    top: int,
    *,
    batch: int,
    workers: int,
    access: Access,
    progress: Callable[[int], object],
) -> Answer:
    """The images nearest to queries (Q, D) among images that are looked at now; those unreadable are counted.

    Raises:
        DataError: an image is gone, or none can be read.
    """
    numbers: list[int] = []

    def blocks() -> Iterator[NDArray[np.float32]]:
        looked = read(images.files, range(len(images)), work.prepare, workers=workers, access=access)
        while some := list(itertools.islice(looked, batch)):
            readable = [each for each in some if each.made is not None]
            numbers.extend(each.number for each in readable)
            progress(len(some))
            if readable:
                yield work.make([each.made for each in readable if each.made is not None])[0]

    found = nearest(queries, blocks(), top)
    if not numbers:
        raise DataError(f"none of the {len(images):,} images can be read")
    similar = [[_of_collection(images, numbers[one.row], one) for one in each] for each in found]
    return Answer(similar, len(numbers), len(images) - len(numbers))


def _of_collection(images: Collection, number: int, neighbour: Neighbour) -> Similar:
    file, label = images.files[number], images.label(number)
    row = Row(told(file.source.path), told(file.name), None if label is None else told(label))
    return Similar(neighbour, row, file)


def _files(rows: Sequence[Row], access: Access) -> dict[Row, ImageFile]:
    """Where images lie that a file of features names; those that are gone are left out."""
    found: dict[Row, ImageFile] = {}
    for path in dict.fromkeys(row.source for row in rows):
        wanted = {row.name: row for row in rows if row.source == path}
        try:
            (source,) = expand_sources([path], access) if not os.path.isdir(path) else (Folder(path),)
            entries = _entries(source, wanted, access)
        except (ConfigError, DataError, ValueError):
            continue  # it lies elsewhere now: the list of names is still an answer
        found |= {wanted[name]: ImageFile(source, entry) for name, entry in entries.items()}
    return found


def _entries(source: Source, names: dict[str, Row], access: Access) -> dict[str, Entry]:
    """The images of these names, which are as a file of features has them."""
    if isinstance(source, Folder) and not is_url(source.path):
        paths = {name: os.path.join(source.path, name) for name in names}
        at = {name: os.stat(path) for name, path in paths.items() if os.path.isfile(path)}
        return {name: Entry(os.fsencode(name), 0, (), status.st_size) for name, status in at.items()}
    listed = list_images([source], access)
    return {name: entry for entry in listed if (name := told(entry.text)) in names}
