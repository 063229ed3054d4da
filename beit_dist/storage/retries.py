"""Retries: which failures may pass, how long to wait, when to give up, and how many retries there were."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from beit_dist.errors import AccessError, StorageError
from beit_dist.storage.counts import Counts

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

CAUSES = ("throttled", "server", "connection", "timeout", "cut", "short")
"""What a retry is counted as: the store asks to slow down; it fails; it cannot be reached or hangs up; it does not
answer in time; a body ends early; a range comes back with another length."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 15.0  # seconds
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, StorageError)
_BY_CODE = {
    "SlowDown": "throttled",
    "ServiceUnavailable": "throttled",
    "Throttling": "throttled",
    "TooManyRequests": "throttled",
    "RequestLimitExceeded": "throttled",
    "429": "throttled",
    "503": "throttled",
    "InternalError": "server",
    "500": "server",
    "502": "server",
    "504": "server",
    "OperationAborted": "server",
    "ConditionalRequestConflict": "server",
    "RequestTimeout": "timeout",
    "IncompleteBody": "cut",
    "BadDigest": "cut",
    "XAmzContentSHA256Mismatch": "cut",
}
# By name, as importing the clients would cost every process a third of a second.
_BY_CLASS = {
    "ReadTimeoutError": "timeout",
    "ConnectTimeoutError": "timeout",
    "ServerTimeoutError": "timeout",
    "FSTimeoutError": "timeout",
    "ClientPayloadError": "cut",
    "IncompleteRead": "cut",
    "ResponseStreamingError": "cut",
    "ResponseParserError": "cut",
    "HTTPClientError": "connection",
    "ConnectionError": "connection",  # botocore's is not the built-in one
    "ClientConnectionError": "connection",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}


class ShortReadError(OSError):
    """An answer has another length than was asked for, though the file has the bytes."""


counts = Counts()
"""Retries of this process, and of its loader processes, by cause."""


def cause_of(error: BaseException) -> str | None:
    """Which of :data:`CAUSES` a failure has; None for one that trying again cannot heal."""
    if isinstance(error, ShortReadError):
        return "short"
    if isinstance(error, (*_FINAL, PermissionError)):
        return None
    code = _code_of(error)
    if code is not None:
        return _BY_CODE.get(code)
    for kind in type(error).__mro__:
        if kind.__name__ in _BY_CLASS:
            return _BY_CLASS[kind.__name__]
    status = getattr(error, "status", None)  # aiohttp.ClientResponseError
    if isinstance(status, int):
        return _BY_CODE.get(str(status)) or ("server" if status >= 500 else None)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return "timeout"
    if isinstance(error, (ConnectionError, EOFError)):
        return "connection"
    if isinstance(error, OSError):
        return {errno.EBUSY: "throttled", errno.EREMOTEIO: "server", errno.EIO: "server"}.get(error.errno or 0)
    return None


class Backoff:
    """The waiting between the attempts of one request: exponential, with full jitter, up to a time limit.

    Args:
        what: the request, for messages.
        limit: seconds from the first failure on.
    """

    def __init__(self, what: str, limit: float) -> None:
        self._what, self._limit = what, limit
        self._failures, self._since = 0, 0.0

    def after(self, error: Exception) -> float:
        """Count a failure; the seconds to wait before the next attempt.

        Raises:
            AccessError: the store refuses these credentials, or there are none.
            StorageError: the time is over.
            Exception: ``error`` itself, if it cannot pass; an OSError, if it is of a client's own kind.
        """
        error = _underneath(error)
        cause = cause_of(error)
        if cause is None:
            _raise_final(error, self._what)
        now = time.monotonic()
        self._since = self._since or now
        pause = random.SystemRandom().uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failures))
        if now + pause - self._since > self._limit:
            raise StorageError(
                f"{self._what}: {_said(error)}. Gave up after {self._failures + 1} attempts in "
                f"{now - self._since:.0f} s. Raise storage.retry_seconds to try for longer."
            ) from error
        self._failures += 1
        counts.add(cause)
        level = logging.WARNING if self._failures in (5, 10) or self._failures % 20 == 0 else logging.DEBUG
        _log.log(level, "%s: %s; attempt %d follows", self._what, _said(error), self._failures + 1)
        return pause


def retrying(action: Callable[[], _Result], what: str, limit: float) -> _Result:
    """``action()``, again and again while it fails in ways that may pass; errors are those of :class:`Backoff`."""
    backoff = Backoff(what, limit)
    while True:
        try:
            return action()
        except Exception as error:
            pause = backoff.after(error)
        time.sleep(pause)


async def retrying_async(action: Callable[[], Awaitable[_Result]], what: str, limit: float) -> _Result:
    """The same for a coroutine."""
    backoff = Backoff(what, limit)
    while True:
        try:
            return await action()
        except Exception as error:
            pause = backoff.after(error)
        await asyncio.sleep(pause)


def _underneath(error: Exception) -> Exception:
    """fsspec's http client says of whatever fails when it asks for a size that there is no such file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_missing = getattr(cause, "status", None) in (404, 410)
    return cause if not is_missing and type(cause).__module__.startswith("aiohttp") else error


def _raise_final(error: Exception, what: str) -> NoReturn:
    """Raise a failure that no retry heals, in our words where the user has to act."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _NO_CREDENTIALS:
        raise AccessError(
            f"{what}: found no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in "
            "the environment. For a public bucket, set storage.options.s3.anon=true."
        ) from error
    status = getattr(error, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        raise AccessError(
            f"{what}: access denied ({_said(error)}). Check the credentials in the environment and what they "
            "may do."
        ) from error
    if type(error).__module__.startswith(("aiohttp", "botocore")):
        raise OSError(f"{what}: {_said(error)}") from error
    raise error


def _code_of(error: BaseException) -> str | None:
    """The S3 error code of what botocore raised, or of what s3fs made of it."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", "")) or None
    return None


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
