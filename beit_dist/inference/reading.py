"""Images one after another, decoded in threads; what cannot be read is told with its reason, and stops nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Generic, NamedTuple, TypeVar

from PIL import Image

from beit_dist.errors import SampleError
from beit_dist.images.decoding import decode
from beit_dist.images.files import ImageFile
from beit_dist.images.labelled.reading import shown
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.storage.access import Access
from beit_dist.stream.labelled.held_out import made_ahead

Made = TypeVar("Made")


class Read(NamedTuple, Generic[Made]):
    """An image by its number, and what was made of it; or why it cannot be read."""

    number: int
    made: Made | None
    reason: str = ""


def read(
    files: Sequence[ImageFile],
    numbers: Sequence[int],
    prepare: Callable[[Image.Image], Made],
    *,
    workers: int,
    access: Access,
) -> Generator[Read[Made], None, None]:
    """What ``prepare`` makes of each of the images, in the order of ``numbers``.

    An image that is damaged, or none, or may not be read is unreadable: its reason is told. One that is gone or
    changed since it was listed, and a disk or store that fails, is an error: the same command may succeed later.

    Args:
        files: of which some are looked at.
        numbers: which ones.
        prepare: called in a thread, with an upright RGB image.
        workers: how many threads there are.
        access: how URLs are reached.

    Raises:
        DataError: an image is gone or changed, or there is too little memory for it; it is named.
        StorageError: a store failed for as long as it was tried again.
    """

    def one(number: int) -> Read[Made]:
        file = files[number]
        try:
            return Read(number, prepare(decode(_bytes(file, access))))
        except ImageRejectedError as error:
            return Read(number, None, str(error))
        except MemoryError:
            raise SampleError(
                f"{shown(file)}: not enough memory to decode it. Use fewer --workers, or more memory"
            ) from None

    return made_ahead(one, numbers, workers)


def _bytes(file: ImageFile, access: Access) -> bytes:
    with file.errors():
        try:
            return file.source.read(file.entry, access)
        except PermissionError as error:  # of this image alone; a store that refuses us raises another
            raise ImageRejectedError(f"cannot be read ({error.strerror})", "not_an_image") from None
