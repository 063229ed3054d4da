"""A file on its way to S3, in parts that are sent side by side: one stream alone does not fill a fast network."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_PART = 16 << 20
"""Bytes of one part of an upload; S3 takes 10,000 parts, so 156 GiB."""
_AT_ONCE = 3
"""Parts under way; with the one being filled, so many times 16 MiB are in memory."""


class S3Upload(io.RawIOBase):
    """What is written becomes the object ``key`` by :meth:`complete`, whole; by :meth:`abort` nothing does.

    Args:
        system: s3fs, whose requests are tried again by themselves.
    """

    def __init__(self, system: Any, bucket: str, key: str) -> None:
        self._system, self._target = system, {"Bucket": bucket, "Key": key}
        self._buffer, self._size = bytearray(), 0
        self._upload: dict[str, str] = {}
        self._parts: deque[Future[dict[str, Any]]] = deque()
        self._done: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(_AT_ONCE, "upload")

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        """Take ``data``; waits when too many parts are under way."""
        with memoryview(data).cast("B") as view:
            self._buffer += view
            self._size += len(view)
            while len(self._buffer) >= _PART:
                self._send(bytes(self._buffer[:_PART]))
                del self._buffer[:_PART]
            return len(view)

    def complete(self) -> None:
        """Send what is left, wait for all parts, and have the store put them together."""
        if not self._upload:
            self._system.call_s3("put_object", **self._target, Body=bytes(self._buffer))
        else:
            if self._buffer:
                self._send(bytes(self._buffer))
            while self._parts:
                self._done.append(self._parts.popleft().result())
            try:
                self._system.call_s3(
                    "complete_multipart_upload",
                    **self._target,
                    **self._upload,
                    MultipartUpload={"Parts": self._done},
                )
            except FileNotFoundError:
                # It is complete but the answer was lost: when asked again the store knows of no such upload.
                if self._system.info("/".join(self._target.values()))["size"] != self._size:
                    raise
        self._close()

    def abort(self) -> None:
        """Forget what was sent; errors do not matter any more."""
        for part in self._parts:
            part.cancel()
        self._pool.shutdown(wait=True)
        if self._upload:
            with contextlib.suppress(Exception):
                self._system.call_s3("abort_multipart_upload", **self._target, **self._upload)
        self._close()

    def _send(self, body: bytes) -> None:
        if not self._upload:
            answer = self._system.call_s3("create_multipart_upload", **self._target)
            self._upload = {"UploadId": answer["UploadId"]}
        if len(self._parts) == _AT_ONCE:
            self._done.append(self._parts.popleft().result())
        number = len(self._done) + len(self._parts) + 1
        self._parts.append(self._pool.submit(self._send_part, number, body))

    def _send_part(self, number: int, body: bytes) -> dict[str, Any]:
        answer = self._system.call_s3("upload_part", **self._target, **self._upload, PartNumber=number, Body=body)
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum") and value}
        checksums.pop("ChecksumType", None)
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    def _close(self) -> None:
        self._pool.shutdown(wait=False)
        self._buffer = bytearray()
        self.close()
