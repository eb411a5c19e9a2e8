"""Requests to an object store by the S3 protocol: retried with back-off, bounded in time, with errors of one line.

Endpoint and credentials come from the environment and the files of AWS: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_PROFILE``, ``AWS_DEFAULT_REGION``, ….
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import random
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from internlm.config.schema.fields import ObjectAddress
from internlm.utils.lazy import require
from internlm.utils.logger import get_logger
from internlm.utils.secrets import MASK, mask_credentials

log = get_logger()

#: Answers to requests that may succeed when they are sent again.
_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}  # 409: a conflict with another conditional request
_TRANSIENT = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError", "ServiceUnavailable"}
_ERRNO_OF_CODE = {
    "NoSuchBucket": errno.ENXIO,  # not ENOENT: a missing bucket is a mistake, a missing object may be expected
    "ExpiredToken": errno.EACCES,
    "InvalidToken": errno.EACCES,
    "QuotaExceeded": errno.EDQUOT,
    "XMinioStorageFull": errno.ENOSPC,
}
_ERRNO_OF_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 416: errno.EINVAL, 507: errno.ENOSPC}


Answer = dict[str, Any] | OSError


class ConditionFailedError(OSError):
    """Error for a conditional request whose condition does not hold.

    The request itself may be the reason: if the answer to it was lost, it was sent again, by this client or by the HTTP
    library below.
    """


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Times in seconds that bound every request to an object store."""

    connect: float = 5.0
    #: Longest silence while a request or its answer is on the way.
    silence: float = 20.0
    request: float = 120.0
    #: A failed request is not sent again after this time.
    retry: float = 60.0
    first_delay: float = 0.2
    longest_delay: float = 10.0


class ObjectClient:
    """Client of the bucket of ``address``. Every call may come from any thread."""

    def __init__(self, address: ObjectAddress, patience: Patience) -> None:
        self.address, self.patience = address, patience
        s3fs = require("s3fs", f"s3://{address.bucket}", "pip install 'InternEvo[s3]'")
        config = {
            "connect_timeout": patience.connect,
            "read_timeout": patience.silence,
            # Retries are counted here, where their total time is bounded.
            "retries": {"mode": "standard", "total_max_attempts": 1},
            # Not all stores know the newer checksums; what is read is verified by the checksums of the manifest.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        # Cached instances and listings would be shared by forked processes, or be out of date.
        self._files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
        self._connected: Any = None
        # A generator of its own: that of the module `random` may be part of the training's state.
        self._random = random.Random()

    def url(self, key: str) -> str:
        """Return the address of ``key``, for messages."""
        return f"s3://{self.address.bucket}/{key}".rstrip("/")

    def call(self, operation: str, key: str, patience: float | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a request, and return its response; the content of a body is at ``"Content"``.

        Args:
            operation: Method of a client of boto3, such as ``get_object``.
            key: Key that the request concerns; it is sent unless ``parameters`` has a ``Prefix`` or ``Delete``.
            patience: Seconds after which a failed request is not sent again; by default, those of the client.
            parameters: Other parameters of the operation.

        Raises:
            OSError: The request failed, for good or for too long.
        """
        return self.result(self.submit(operation, key, patience, **parameters))

    def submit(self, operation: str, key: str, patience: float | None = None, **parameters: Any) -> Future[Answer]:
        """Send a request in the background, as :meth:`call` does; :meth:`result` returns its response."""
        if parameters.keys().isdisjoint({"Prefix", "Delete"}):
            parameters["Key"] = key
        limit = self.patience.retry if patience is None else patience
        return asyncio.run_coroutine_threadsafe(self._answer(operation, key, parameters, limit), self._files.loop)

    @staticmethod
    def result(future: Future[Answer]) -> dict[str, Any]:
        """Wait for the response of a request; its errors are those of :meth:`call`."""
        answer = future.result()
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def _answer(self, operation: str, key: str, parameters: dict[str, Any], limit: float) -> Answer:
        # A future would replace a TimeoutError by a new one, which has no path.
        try:
            return await self._retried(operation, key, parameters, limit)
        except OSError as error:
            return error

    async def _retried(self, operation: str, key: str, parameters: dict[str, Any], limit: float) -> dict[str, Any]:
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return await asyncio.wait_for(self._once(operation, parameters), self.patience.request)
            except Exception as error:
                failure = _to_failure(error)
                if failure is None:
                    raise
            delay = min(self.patience.first_delay * 2 ** (tries - 1), self.patience.longest_delay)
            delay *= self._random.uniform(0.5, 1.0)
            elapsed = time.monotonic() - started
            if not failure.is_transient or elapsed + delay > limit:
                raise failure.as_error(self.url(key), tries, elapsed)
            if delay > 1:
                log.warning(f"{self.url(key)}: {failure.message}; trying again in {delay:.0f} s")
            await asyncio.sleep(delay)

    async def _once(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        client = await self._files.set_session()
        if client is not self._connected:
            # The HTTP library bounds the wait for an answer by the time of silence, but not that for "100 Continue".
            expect = importlib.import_module("botocore.handlers").add_expect_header
            client.meta.events.unregister("before-call.s3", expect)
            self._connected = client
        response: dict[str, Any] = await getattr(client, operation)(Bucket=self.address.bucket, **parameters)
        if "Body" in response:
            async with response["Body"] as body:
                response["Content"] = await body.read()
            if len(response["Content"]) != response["ContentLength"]:
                raise ConnectionResetError(
                    f"expected {response['ContentLength']} bytes, got {len(response['Content'])}"
                )
        return response


@dataclass(frozen=True)
class _Failure:
    """Why a request failed, in one line."""

    code: int
    message: str
    is_transient: bool = False

    def as_error(self, url: str, tries: int, seconds: float) -> OSError:
        message = f"{self.message}, {tries} times in {seconds:.0f} s" if tries > 1 else self.message
        kind = ConditionFailedError if self.code == errno.EEXIST else OSError
        return kind(self.code, message, url)


def _to_failure(error: Exception) -> _Failure | None:
    """Translate an error of a request; return None for one that is a bug."""
    exceptions: Any = importlib.import_module("botocore.exceptions")
    if isinstance(error, exceptions.ClientError):
        return _of_response(error.response)
    message = _one_line(str(error)) or type(error).__name__
    if isinstance(error, exceptions.SSLError):
        return _Failure(errno.EPROTO, message)
    if isinstance(error, exceptions.HTTPClientError) and isinstance(error.kwargs.get("error"), ValueError):
        return _Failure(errno.EINVAL, message)  # an endpoint that the HTTP client refuses
    if isinstance(error, asyncio.TimeoutError | exceptions.ReadTimeoutError | exceptions.ConnectTimeoutError):
        return _Failure(errno.ETIMEDOUT, f"no answer in time ({message})", is_transient=True)
    dropped: tuple[type[Exception], ...] = (
        OSError,
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        importlib.import_module("aiohttp").ClientError,
    )
    if isinstance(error, dropped):
        return _Failure(errno.ECONNRESET, message, is_transient=True)
    if isinstance(error, importlib.import_module("botocore.parsers").ResponseParserError):
        return _Failure(errno.EREMOTEIO, "the answer cannot be read", is_transient=True)
    if isinstance(error, exceptions.NoCredentialsError | exceptions.CredentialRetrievalError):
        return _Failure(errno.EACCES, message)
    if isinstance(error, exceptions.BotoCoreError | ValueError):  # a malformed endpoint is a ValueError
        return _Failure(errno.EINVAL, message)
    return None


def _of_response(response: dict[str, Any]) -> _Failure:
    """Translate an error that the store sent."""
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code, text = (str(response.get("Error", {}).get(key) or "") for key in ("Code", "Message"))
    # The answer to a HEAD request has no body, and botocore repeats its status as the code.
    message = _one_line(f"HTTP {status} {'' if code == str(status) else code}" + (f" ({text})" if text else ""))
    if status == 412:
        return _Failure(errno.EEXIST, message)
    if status == 404 and code != "NoSuchBucket":
        message = f"does not exist ({message})"
    is_transient = status in _TRANSIENT_STATUS or code in _TRANSIENT
    return _Failure(_ERRNO_OF_CODE.get(code) or _ERRNO_OF_STATUS.get(status, errno.EREMOTEIO), message, is_transient)


def _one_line(text: str) -> str:
    """Join the lines of a message, and mask credentials in it: of URLs, and those of the environment."""
    text = mask_credentials(" ".join(text.split()))
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, MASK)
    return text[:500]
