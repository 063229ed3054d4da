"""What the system says about the data set's folder, as errors that a user can act on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from beit_dist.errors import SampleError, SpaceError, StorageError
from beit_dist.storage.place import Place


@contextlib.contextmanager
def storage_errors(out: Place) -> Iterator[None]:
    """What the system says about the data set's folder, as errors that a user can act on.

    Raises:
        SpaceError: the disk or quota is full.
        SampleError: anything else, such as a missing permission or a lost network file system.
    """
    try:
        yield
    except (StorageError, BrokenPipeError):
        raise  # the pipe is our output's; a store's failures tell the user what to do
    except OSError as error:
        place, reason = error.filename or out, (error.strerror or str(error)).rstrip(".")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"{place}: {reason}. Make room and run the same command again") from None
        raise SampleError(f"{place}: {reason}. Run the same command again once that is fixed") from None
