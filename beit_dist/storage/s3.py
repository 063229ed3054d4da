"""s3fs with our retries: each request, the parts of an upload included, is tried again until a time limit."""

from __future__ import annotations

from typing import Any

import s3fs
from fsspec.asyn import sync, sync_wrapper

from beit_dist.storage.access import Access
from beit_dist.storage.retries import retrying_async
from beit_dist.storage.s3_ranges import S3Ranges


class PatientS3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs tries a request five times, over about a second; a store that is being resized takes longer."""

    retries = 1
    retry_seconds = Access.retry_seconds
    ranges: S3Ranges | None = None
    """What reads ranges in its place."""

    def cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None
    ) -> Any:
        """See s3fs; what it gives has the buffer of bytes."""
        if self.ranges is not None and version_id is None and start is not None and end is not None:
            bucket, key, _ = self.split_path(path)
            return self.ranges.read(bucket, key, start, end - start)
        return sync(self.loop, self._cat_file, path, version_id=version_id, start=start, end=end)

    async def _call_s3(self, method: str, *arguments: Any, **settings: Any) -> Any:
        what = f"s3://{settings.get('Bucket', '')}/{settings.get('Key') or settings.get('Prefix') or ''}: {method}"

        async def call() -> Any:
            return await super(PatientS3FileSystem, self)._call_s3(method, *arguments, **settings)

        return await retrying_async(call, what, self.retry_seconds)

    call_s3 = sync_wrapper(_call_s3)


def open_s3(access: Access) -> PatientS3FileSystem:
    """A file system of this process, with connections for parallel reads and without a cache of listings."""
    options = dict(access.options.get("s3", {}))
    config = {
        "connect_timeout": access.connect_seconds,
        "read_timeout": access.read_seconds,
        "max_pool_connections": access.connections,
        "retries": {"total_max_attempts": 1},
        **options.pop("config_kwargs", {}),
    }
    system = PatientS3FileSystem(
        config_kwargs=config,
        use_listings_cache=False,
        skip_instance_cache=True,
        default_cache_type="none",
        **options,
    )
    system.retry_seconds = access.retry_seconds
    if access.s3_reader == "obstore":
        system.ranges = S3Ranges(system, access)
    return system
