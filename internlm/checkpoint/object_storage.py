"""Storage of checkpoints in an object store: a save is committed by a conditional PUT of its manifest.

An object store has no rename, but a PUT replaces an object as a whole, and its conditions (``If-None-Match``,
``If-Match``) hold against all other clients. A listing shows every object whose PUT has succeeded.

A PUT whose answer does not come may be executed later, after the save was given up. Three rules make that harmless:

1. Files of an attempt stay as long as a PUT of its manifest may be on its way and would replace a checkpoint.
2. A manifest that arrives when the files of its attempt are gone is all there is, and no checkpoint.
3. A PUT that fails since such a manifest has arrived is sent again, if this run still owns the folder.
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from internlm.checkpoint.local_files import split_name
from internlm.checkpoint.object_client import ConditionFailedError, ObjectClient, Patience
from internlm.checkpoint.object_files import ObjectSink, ObjectSource
from internlm.checkpoint.storage import COMPARED_BYTES, MANIFEST, PARTIAL, partial_name
from internlm.config.schema.fields import ObjectAddress

_KEYS_PER_REQUEST = 1000
_MOST_MANIFEST_BYTES = 1 << 30
# At the start a wrong endpoint is likelier than one that is down.
_START_PATIENCE = 10.0
_CHECKPOINT = re.compile(r"(step|snapshot)-[0-9]+/")
_FILE_OF_ATTEMPT = re.compile(r"(?P<folder>(?P<checkpoint>(step|snapshot)-[0-9]+)/[^/]+)/.+")
#: Seconds after which no PUT of a manifest is on its way any more: stores refuse requests that were signed more than
#: 15 minutes ago.
LATEST_REQUEST = 3600.0


class ObjectStorage:
    """Storage in the bucket and below the prefix of ``address``, by the S3 protocol."""

    def __init__(self, address: ObjectAddress, patience: Patience | None = None) -> None:
        self._client = ObjectClient(address, patience or Patience())
        self._prefix = f"{address.prefix}/" if address.prefix else ""
        self.location = self._client.url(address.prefix)
        # Attempts whose manifest was sent, without an answer that says what became of it.
        self._undecided: set[str] = set()

    def path(self, name: str) -> str:
        """Return the address of ``name``."""
        return f"{self.location}/{name}".rstrip("/")

    def prepare(self) -> None:
        """Check that objects can be written and deleted; folders need not be created."""
        probe = self._key(partial_name("writable"))
        try:
            self._client.call("put_object", probe, _START_PATIENCE, Body=b"")
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(errno.ENXIO, "the bucket does not exist", self.location) from None
            raise
        self._client.call("delete_object", probe, _START_PATIENCE)

    # -- files

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names in ``folder``; those of folders end with a slash."""
        prefix = self._folder(folder)
        found: set[str] = set()
        for page in self._pages("list_objects_v2", prefix, Delimiter="/", MaxKeys=_KEYS_PER_REQUEST):
            found.update(entry["Prefix"][len(prefix) :] for entry in page.get("CommonPrefixes", ()))
            found.update(entry["Key"][len(prefix) :] for entry in page.get("Contents", ()))
        # Some tools create an object whose key is that of a folder.
        return sorted(found - {"", "/"})

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of an object of at most ``limit`` bytes."""
        content, _, size = self._read_range(name, limit)
        if size > limit:
            raise OSError(errno.EFBIG, f"expected at most {limit} bytes, got {size}", self.path(name))
        return content

    def open(self, name: str) -> ObjectSource:
        """Open an object for reading."""
        head = self._client.call("head_object", self._key(name))
        return ObjectSource(self._client, self._key(name), head["ContentLength"], head["ETag"])

    def create(self, name: str) -> ObjectSink:
        """Create an object, which exists as soon as the ``with`` block of the result ends."""
        return ObjectSink(self._client, self._key(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, replacing an older one."""
        self._client.call("put_object", self._key(name), Body=data)

    def compare_and_swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Replace the content ``old`` by ``new`` by a PUT whose condition is the ETag of ``old``.

        Processes that compete write contents that differ: the owner of a content that is found is the one who swapped.
        Not every store can delete on a condition, so None is written as an empty object, which counts as None.
        """
        try:
            content, etag, _ = self._read_range(name, COMPARED_BYTES)
        except FileNotFoundError:
            content, etag = b"", None
        if content != (old or b""):
            return False
        if not content and new is None:
            return True
        try:
            self._put_if(self._key(name), new or b"", etag)
        except ConditionFailedError:  # unless this PUT itself has made it false
            return self._read_range(name, COMPARED_BYTES)[0] == (new or b"")
        except FileNotFoundError:  # deleted since it was read
            return False
        return True

    def age(self, name: str) -> float:
        """Return the seconds since ``name`` was written, by the clock of the store, which has whole seconds."""
        head = self._client.call("head_object", self._key(name))
        return _age(head, head["LastModified"])

    def written(self, name: str) -> float:
        """Return the time of the last change of ``name``."""
        return float(self._client.call("head_object", self._key(name))["LastModified"].timestamp())

    # -- checkpoints

    def attempt_folder(self, checkpoint: str, attempt: str) -> str:
        """Return ``<checkpoint>/<attempt>``."""
        return f"{checkpoint}/{attempt}"

    def publish(self, checkpoint: str, attempt: str, manifest: bytes, check: Callable[[], None] | None = None) -> None:
        """Write the manifest, unless another process has just written or replaced it; then remove older attempts."""
        key = self._key(f"{checkpoint}/{MANIFEST}")
        # The manifest may be replaced between HEAD and PUT. The owner of the folder tries once more, since that was a
        # late PUT of a save that was given up.
        for _ in range(1 if check is None else 2):
            try:
                etag = self._client.call("head_object", key)["ETag"]
            except FileNotFoundError:
                etag = None
            # After the ETag is known: if this run is stopped for long, it must not replace what the next owner saves.
            if check is not None:
                check()
            if self._put_manifest(f"{checkpoint}/{attempt}", key, manifest, etag):
                break
        else:
            raise OSError(errno.EEXIST, "another run has just saved this checkpoint", self.path(checkpoint))
        # The save has succeeded: what cannot be removed now is one of the leftovers.
        with suppress(OSError):
            for folder in self.names(checkpoint):
                if folder.endswith("/") and folder != f"{attempt}/":
                    self.remove(f"{checkpoint}/{folder}")

    def _put_manifest(self, attempt: str, key: str, manifest: bytes, etag: str | None) -> bool:
        """Write the manifest if the present one has the ETag; return whether it is there."""
        self._undecided.add(attempt)
        try:
            self._put_if(key, manifest, etag)
            is_there = True
        except ConditionFailedError:
            # Every attempt has a manifest of its own, so if it is there, this PUT has made the condition false.
            is_there = self._read_range(key[len(self._prefix) :], len(manifest) + 1)[0] == manifest
        except FileNotFoundError:  # deleted since its ETag was read
            is_there = False
        self._undecided.remove(attempt)
        return is_there

    def discard(self, checkpoint: str, attempt: str) -> None:
        """Delete the objects of the attempt, unless the manifest names them, or was sent and may still arrive.

        In the latter case, the next owner of the folder deletes them.
        """
        folder = self.attempt_folder(checkpoint, attempt)
        if folder not in self._undecided and not self._named(checkpoint, {f"{attempt}/"}):
            self.remove(folder)

    def withdraw(self, checkpoint: str, attempt: str) -> None:
        """Delete the manifest, so that there is no checkpoint any more, and then the other objects."""
        key = self._key(f"{checkpoint}/{MANIFEST}")
        self._client.call("head_object", key)
        self._client.call("delete_object", key)
        self.remove(checkpoint)

    def remove(self, folder: str) -> None:
        """Delete all objects in a folder, or one object, and abort uploads into the folder."""
        folder = folder.rstrip("/")
        if not folder:
            raise OSError(errno.EINVAL, "expected the name of a folder", self.location)
        prefix = self._folder(folder)
        self._client.call("delete_object", prefix.rstrip("/"))
        for page in self._pages("list_objects_v2", prefix, MaxKeys=_KEYS_PER_REQUEST):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
            if keys:
                answer = self._client.call("delete_objects", prefix, Delete={"Objects": keys, "Quiet": True})
                for error in answer.get("Errors", ()):
                    raise OSError(errno.EIO, f"cannot be deleted ({error.get('Code')})", self._client.url(error["Key"]))
        for key, upload in self._uploads(prefix):
            with suppress(FileNotFoundError):
                self._client.call("abort_multipart_upload", key, UploadId=upload)

    def leftovers(self, settled: bool = False) -> dict[str, str]:
        """Return the folders of attempts that no manifest names; those of an unreadable manifest are left alone."""
        found: dict[str, str] = {}
        for name in filter(_CHECKPOINT.fullmatch, self.names()):
            checkpoint, names = name.rstrip("/"), self.names(name)
            if names == [MANIFEST]:  # its attempt is gone
                found[checkpoint] = checkpoint
            left = self._unnamed(checkpoint, names, settled)
            found |= {f"{checkpoint}/{folder.rstrip('/')}": checkpoint for folder in sorted(left)}
        # An attempt that has nothing but parts of files was never published.
        for _, _, match in self._uploads_of_attempts():
            if match["folder"] not in found and not self.names(match["folder"]):
                found[match["folder"]] = match["checkpoint"]
        return found

    def restore(self) -> list[str]:
        """Return no names: the PUT of a manifest replaces the older checkpoint at once."""
        return []

    def sweep(self) -> None:
        """Delete what checks wrote, and abort all uploads: the owner has begun none when it starts."""
        for name in filter(PARTIAL.fullmatch, self.names()):
            self._client.call("delete_object", self._key(name))
        for key, upload, _ in self._uploads_of_attempts():
            with suppress(FileNotFoundError):
                self._client.call("abort_multipart_upload", key, UploadId=upload)

    def free_bytes(self) -> None:
        """Return None: an object store has no limit that can be queried."""

    def _unnamed(self, checkpoint: str, names: Sequence[str], settled: bool) -> set[str]:
        """Return the folders of attempts of a checkpoint that its manifest does not name."""
        folders = {name for name in names if name.endswith("/")}
        if MANIFEST in names and len(folders) < 2:
            return set()  # the manifest, which may be large, need not be read: the folder is that of the checkpoint
        named = self._named(checkpoint, folders)
        if named is None:
            return folders
        # One of them is the checkpoint's, so a manifest that names none is damaged.
        unnamed = folders - named if named else set()
        return {f for f in unnamed if not settled or self._last_write(f"{checkpoint}/{f}") > LATEST_REQUEST}

    def _named(self, checkpoint: str, folders: set[str]) -> set[str] | None:
        """Return those of ``folders`` that the manifest names, with their slash; None if there is no manifest."""
        try:
            manifest = self.read(f"{checkpoint}/{MANIFEST}", _MOST_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        return {folder for folder in folders if f'"{folder}'.encode() in manifest}

    def _last_write(self, folder: str) -> float:
        """Return the seconds since an object in ``folder`` was written, by the clock of the store."""
        ages = [math.inf]
        for page in self._pages("list_objects_v2", self._folder(folder), MaxKeys=_KEYS_PER_REQUEST):
            ages += [_age(page, entry["LastModified"]) for entry in page.get("Contents", ())]
        return min(ages)

    # -- requests

    def _key(self, name: str) -> str:
        if not split_name(name):
            raise OSError(errno.EINVAL, "expected the name of an object", self.location)
        return self._prefix + name

    def _folder(self, folder: str) -> str:
        """Return the prefix of the keys in a folder."""
        return f"{self._key(folder.rstrip('/'))}/" if folder else self._prefix

    def _read_range(self, name: str, limit: int) -> tuple[bytes, str, int]:
        """Return the first ``limit`` bytes of an object, its ETag and its size."""
        while True:
            try:
                response = self._client.call("get_object", self._key(name), Range=f"bytes=0-{limit - 1}")
            except OSError as error:
                if error.errno != errno.EINVAL:  # an empty object has no range
                    raise
                response = self._client.call("head_object", self._key(name))
                if response["ContentLength"]:  # it has just been replaced
                    continue
            size = int(response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"])
            return response.get("Content", b""), response["ETag"], size

    def _put_if(self, key: str, data: bytes, etag: str | None) -> None:
        """Replace the object that has the ETag; without one, create the object only if there is none."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        self._client.call("put_object", key, Body=data, **condition)

    def _pages(self, operation: str, prefix: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        token: dict[str, Any] = {}
        while True:
            page = self._client.call(operation, prefix, Prefix=prefix, **parameters, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _uploads(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the key and the id of every upload in parts that was neither completed nor aborted."""
        marker: dict[str, Any] = {}
        while True:
            page = self._client.call("list_multipart_uploads", prefix, Prefix=prefix, **marker)
            for upload in page.get("Uploads", ()):
                if upload["Key"].startswith(prefix):
                    yield upload["Key"], upload["UploadId"]
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _uploads_of_attempts(self) -> Iterator[tuple[str, str, re.Match[str]]]:
        """Yield key, id and names of the uploads of saves; other folders of a user may lie in this one."""
        for key, upload in self._uploads(self._prefix):
            if match := _FILE_OF_ATTEMPT.fullmatch(key[len(self._prefix) :]):
                yield key, upload, match


def _age(response: dict[str, Any], written: datetime) -> float:
    """Return the seconds from ``written`` to the time of the response, both by the clock of the store."""
    now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
    return (now - written).total_seconds()
