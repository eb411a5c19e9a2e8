"""Objects that are open: read in ranges, and written in parts.

An object exists as soon as it is complete; what was sent of one that was abandoned is removed.
"""

from __future__ import annotations

import errno
from collections import deque
from concurrent.futures import Future, wait
from contextlib import suppress
from types import TracebackType

from internlm.checkpoint.object_client import Answer, ConditionFailedError, ObjectClient

#: Size of the parts of a large object in bytes; a store takes 10,000 of them. While a file is written, one part is
#: filled and up to two are sent. The connection may hold a copy of those: five times this size is the memory of a rank.
PART_BYTES = 12 << 20
_MOST_PARTS = 10_000
_PARTS_IN_FLIGHT = 2


class ObjectSource:
    """Object that is open for reading, in ranges."""

    def __init__(self, client: ObjectClient, key: str, size: int, etag: str) -> None:
        self._client, self._key, self._etag = client, key, etag
        self.size = size

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``position`` on."""
        count = min(len(buffer), self.size - position)
        if count <= 0:
            return 0
        last = position + count - 1
        try:
            response = self._client.call("get_object", self._key, Range=f"bytes={position}-{last}", IfMatch=self._etag)
        except ConditionFailedError:
            message = "was replaced while it was read"
            raise OSError(errno.EIO, message, self._client.url(self._key)) from None
        buffer[:count] = response["Content"]
        return count

    def close(self) -> None:
        """Do nothing: every range is a request of its own."""


class ObjectSink:
    """Object that is being written: at once if it is small, else in parts, which are sent in the background."""

    def __init__(self, client: ObjectClient, key: str) -> None:
        self._client, self._key = client, key
        self._part = bytearray()
        self._upload: str | None = None
        self._sent: deque[Future[Answer]] = deque()
        self._etags: list[str] = []
        self._size = 0

    def write(self, data: memoryview) -> None:
        """Append ``data``; block while two parts are on the way."""
        data = data.cast("B")
        self._size += len(data)
        while len(data):
            taken = min(len(data), PART_BYTES - len(self._part))
            self._part += data[:taken]
            data = data[taken:]
            if len(self._part) == PART_BYTES:
                self._send_part()

    def __enter__(self) -> ObjectSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            kind = BaseException
            raise
        finally:
            if kind is not None:
                self._abandon()

    def _send_part(self) -> None:
        if self._upload is None:
            self._upload = self._client.call("create_multipart_upload", self._key)["UploadId"]
        while len(self._sent) >= _PARTS_IN_FLIGHT:
            self._etags.append(self._client.result(self._sent.popleft())["ETag"])
        number = len(self._etags) + len(self._sent) + 1
        if number > _MOST_PARTS:
            message = f"an object has at most {_MOST_PARTS * PART_BYTES >> 30} GiB"
            raise OSError(errno.EFBIG, message, self._client.url(self._key))
        sent, self._part = self._part, bytearray()
        self._sent.append(
            self._client.submit("upload_part", self._key, UploadId=self._upload, PartNumber=number, Body=sent)
        )

    def _finish(self) -> None:
        if self._upload is None:
            self._client.call("put_object", self._key, Body=bytes(self._part))
            return
        if self._part:
            self._send_part()
        while self._sent:
            self._etags.append(self._client.result(self._sent.popleft())["ETag"])
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._etags, 1)]
        try:
            self._client.call(
                "complete_multipart_upload", self._key, UploadId=self._upload, MultipartUpload={"Parts": parts}
            )
        except FileNotFoundError:
            # The answer to a first request may have been lost: then the upload is complete, and unknown by its id.
            if self._client.call("head_object", self._key)["ContentLength"] != self._size:
                raise

    def _abandon(self) -> None:
        # A part that arrives after its upload was aborted would be kept, and paid for.
        wait(self._sent, timeout=self._client.patience.silence)
        for future in self._sent:
            future.cancel()
        if self._upload is not None:
            with suppress(OSError):
                self._client.call("abort_multipart_upload", self._key, UploadId=self._upload)
