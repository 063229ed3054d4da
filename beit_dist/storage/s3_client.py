"""s3fs with our retries: each request, the parts of an upload included, is tried again until a time limit."""

from __future__ import annotations

from typing import Any

import s3fs
from fsspec.asyn import sync_wrapper

from beit_dist.storage.access import Access
from beit_dist.storage.retries import retrying_async


class PatientS3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs tries a request five times, over about a second; a store that is being resized takes longer."""

    retries = 1
    retry_seconds = Access.retry_seconds

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
    return system
