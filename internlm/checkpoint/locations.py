"""Locations of checkpoints: local folders, and addresses of object stores.

====================================================  =================================
location                                              storage
====================================================  =================================
``local:FOLDER``, or a plain path                     :class:`LocalStorage`
``s3://BUCKET/FOLDER``, ``boto3:s3://BUCKET/FOLDER``  :class:`ObjectStorage`
====================================================  =================================
"""

from __future__ import annotations

import os
from pathlib import Path

from internlm.checkpoint.local_storage import LocalStorage
from internlm.checkpoint.object_storage import ObjectStorage
from internlm.checkpoint.storage import Storage
from internlm.config.schema.fields import ObjectAddress, parse_object_address
from internlm.utils.errors import CheckpointError, Problem

_LOCAL = "local:"


def open_storage(location: str) -> Storage:
    """Return the storage at ``location``, which need not exist yet. Nothing is read or written.

    Raises:
        CheckpointError: The kind of storage is unknown, or the location is malformed.
        UserError: The package that an object store needs is not installed.
    """
    if address := _object_address(location):
        return ObjectStorage(address)
    if not location.removeprefix(_LOCAL):
        raise CheckpointError(Problem(repr(location), "names no folder", "Use local:FOLDER or a plain path"))
    return LocalStorage(Path(location.removeprefix(_LOCAL)))


def split_checkpoint(location: str) -> tuple[str, str]:
    """Split the location of one checkpoint into the location of its storage and its name there.

    ``local:ckpts/step-40/`` gives ``local:ckpts`` and ``step-40``; ``step-40`` alone gives ``.`` and ``step-40``. A
    symbolic link, such as ``latest``, is replaced by its target: whoever names a link means its target, while storages
    follow no links that they find.

    Raises:
        CheckpointError: The location is malformed, or names no folder in a storage.
    """
    if address := _object_address(location):
        outer, _, name = address.prefix.rpartition("/")
        outer = "/".join(filter(None, (address.bucket, outer)))
        storage = f"s3://{outer}"
    else:
        protocol = _LOCAL if location.startswith(_LOCAL) else ""
        path = os.path.expanduser(location.removeprefix(_LOCAL)).rstrip("/")
        if path and (os.path.islink(path) or os.path.basename(path) in (".", "..")):
            path = os.path.realpath(path)
        outer, name = os.path.split(path)
        storage = protocol + (outer or ".")
    if not name:
        raise CheckpointError(Problem(repr(location), "names no checkpoint", "Add its folder, such as step-1000"))
    return storage, name


def _object_address(location: str) -> ObjectAddress | None:
    try:
        return parse_object_address(location)
    except ValueError as error:
        raise CheckpointError(Problem("checkpoint location", str(error))) from None
