"""Ranges of objects in S3 by obstore: requests run outside Python and take less of the processor for each byte.

Only for reading ranges, of which training needs many. Where the store is and which credentials hold is what s3fs
found out; how long a request is tried again, and what is counted, are ours.
"""

from __future__ import annotations

import http.client
import re
from datetime import datetime, timedelta, timezone
from typing import Any, cast

from botocore.exceptions import NoCredentialsError
from fsspec.asyn import sync

from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access
from beit_dist.storage.retries import ShortReadError

_STATUS = re.compile(r"status code: (\d{3})")
_RANGE_NOT_SATISFIABLE = 416  # it begins behind the end of the file
_CREDENTIALS_HOLD = timedelta(minutes=5)
"""Then s3fs is asked again, which renews those that expire."""


class S3Ranges:
    """Reads ranges. Of one process, as ``system`` is.

    Args:
        system: the client of s3fs that knows the store.
        access: time limits.

    Raises:
        ConfigError: obstore is not installed.
    """

    def __init__(self, system: Any, access: Access) -> None:
        try:
            import obstore
        except ImportError:
            raise ConfigError(
                "storage.s3_reader", "obstore", "an installed package", "pip install 'beit_dist[obstore]'"
            ) from None
        self._get_range = obstore.get_range
        self._system, self._access = system, access
        self._stores: dict[str, Any] = {}

    def read(self, bucket: str, key: str, offset: int, size: int) -> Any:
        """The range, or what there is of it, as something with the bytes' buffer; one attempt.

        Raises:
            OSError: of the kinds that :func:`beit_dist.storage.retries.cause_of` tells apart.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            return self._get_range(self._store(bucket), key, start=offset, length=size)
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(_first_line(error)) from None
        except FileNotFoundError as error:
            raise FileNotFoundError(_first_line(error)) from None
        except BaseError as error:
            if _status_of(error) == _RANGE_NOT_SATISFIABLE:
                return b""
            raise _in_our_terms(error) from None

    def _store(self, bucket: str) -> Any:
        if bucket not in self._stores:
            from obstore.store import S3Store

            meta, anonymous = self._system.s3.meta, bool(self._system.anon)
            if not anonymous:
                self._credentials()  # so that it is said in our words that there are none
            self._stores[bucket] = S3Store(
                bucket,
                endpoint=meta.endpoint_url,
                region=meta.region_name or "us-east-1",
                skip_signature=anonymous,
                credential_provider=None if anonymous else cast("Any", self._credentials),
                client_options={
                    "allow_http": meta.endpoint_url.startswith("http://"),
                    "connect_timeout": timedelta(seconds=self._access.connect_seconds),
                    "read_timeout": timedelta(seconds=self._access.read_seconds),
                    "timeout": timedelta(days=1),  # of the whole; a slow answer is no failure
                    "pool_max_idle_per_host": str(self._access.connections),
                },
                retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
            )
        return self._stores[bucket]

    def _credentials(self) -> dict[str, Any]:
        system = self._system
        key, secret, token = system.key, system.secret, system.token
        if key is None:

            async def found() -> Any:
                credentials = await system.session.get_credentials()
                return None if credentials is None else await credentials.get_frozen_credentials()

            credentials = sync(system.loop, found)
            if credentials is None:
                raise NoCredentialsError
            key, secret, token = credentials.access_key, credentials.secret_key, credentials.token
        expires = datetime.now(timezone.utc) + _CREDENTIALS_HOLD
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": expires}


def _in_our_terms(error: Exception) -> OSError | http.client.IncompleteRead:
    """obstore has one class for most failures, and says in words which it was."""
    text, said = str(error), _first_line(error)
    if status := _status_of(error):
        failure = OSError(said)
        failure.status = status  # type: ignore[attr-defined]
        return failure
    if "non-partial" in said:
        return ShortReadError(said)
    if "Timeout" in text or "TimedOut" in text:
        return TimeoutError(said)
    if "body error" in said:
        return http.client.IncompleteRead(b"")
    return ConnectionError(said) if "HTTP error" in said else OSError(said)


def _status_of(error: Exception) -> int | None:
    status = _STATUS.search(_first_line(error))
    return int(status[1]) if status else None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
