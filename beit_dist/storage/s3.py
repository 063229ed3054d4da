"""A folder of a bucket, at S3 and what speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from beit_dist.storage.listings import s3_files
from beit_dist.storage.remote import RemotePlace
from beit_dist.storage.uploads import S3Upload


class S3Place(RemotePlace):
    """Lists a bucket page by page, and sends large files in parts side by side."""

    def files(self) -> Iterator[tuple[str, int]]:
        bucket, _, key = self.address.partition("/")
        yield from s3_files(self.system(), bucket, f"{key}/" if key else "")

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        upload = S3Upload(self.system(), *f"{self.address}/{name}".split("/", 1))
        try:
            yield cast(BinaryIO, upload)
            upload.complete()
        except BaseException:
            upload.abort()
            raise

    def open_system(self) -> Any:
        from beit_dist.storage.s3_client import open_s3  # its import takes a third of a second

        return open_s3(self.access)
