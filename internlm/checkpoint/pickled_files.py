"""Files of tensors that ``torch.save`` has written: loaded by torch's restricted unpickler, and mapped into memory."""

from __future__ import annotations

import pickle
import re
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.safetensors_files import DOWNLOAD, quoted
from internlm.utils.errors import CheckpointError, Problem

#: Size limit of the pickle in a file, which lists its tensors, in bytes.
_LARGEST_PICKLE = 1 << 24


def load_tensors(file: Path, trust: bool | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory; their content is not read.

    Args:
        file: The file, with a dict of tensors.
        trust: Whether a file that needs more than tensors is unpickled all the same, which runs any code that it
            names. None: it is not, and the error offers no way.

    Raises:
        CheckpointError: It is no archive of tensors as ``torch.save`` writes it, or is not trusted.
    """
    with _naming(file, trust):
        content = _unpickled(file, trust)
        if not isinstance(content, dict):
            raise ValueError(f"expected a dict of tensors, got {type(content).__name__}")
        size = file.stat().st_size
        for name, tensor in content.items():
            if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided):
                raise ValueError(f"expected a tensor as {reprlib.repr(name)}, got {type(tensor).__name__}")
            # A view with strides of 0 could have any shape.
            if not tensor.is_contiguous() or tensor.nbytes > size:
                raise ValueError(f"{quoted(name)} is not stored as a whole")
        return {name: tensor.detach() for name, tensor in content.items()}


def load_dict(file: Path, trust: bool | None, classes: Mapping[str, type]) -> dict[str, Any]:
    """Return a small dict that was saved by ``torch.save``.

    Args:
        file: The file.
        trust: As for :func:`load_tensors`.
        classes: Classes that stand for those in the file, by their full names there.

    Raises:
        CheckpointError: It cannot be loaded, holds something else, or is not trusted.
    """
    with _naming(file, trust):
        with torch.serialization.safe_globals([(known, name) for name, known in classes.items()]):
            content = _unpickled(file, trust)
        if not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
            raise ValueError(f"expected a dict with names as keys, got {reprlib.repr(content)}")
        return dict(content)


def _unpickled(file: Path, trust: bool | None) -> Any:
    # First: the unpickler itself has no bounds.
    _check_archive(file)
    try:
        return torch.load(file, map_location=_on_host, weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        # A flag that is not needed changes nothing: tensors alone are never loaded by the other unpickler.
        if not trust:
            raise
        return torch.load(file, map_location=_on_host, weights_only=False, mmap=True)


def _on_host(storage: Any, location: str) -> Any:
    """Keep a storage on the host, wherever it was saved from."""
    return storage


@contextmanager
def _naming(file: Path, trust: bool | None) -> Iterator[None]:
    """Raise an error of the ``with`` block as one that names the file; unpickling raises nearly anything."""
    try:
        yield
    except Exception as error:
        reason, todo = (str(error).strip().splitlines() or [type(error).__name__])[0][:300], DOWNLOAD
        # Torch explains at length how to load the file all the same.
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            reason = f"its pickle names {found[1][:100]}, and not only tensors"
            if trust is not None:
                todo = "Pass --trust if you trust its origin: unpickling runs any code that the file names"
        raise CheckpointError(Problem(str(file), f"cannot be loaded ({reason})", todo)) from None


def _check_archive(file: Path) -> None:
    """Check that nothing in an archive is compressed, which could be of any size, and that its pickle is small."""
    if not file.is_file():
        raise ValueError("expected a regular file")
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            is_pickle = entry.filename.endswith(".pkl")
            if entry.compress_type != zipfile.ZIP_STORED or (is_pickle and entry.file_size > _LARGEST_PICKLE):
                raise ValueError(f"{quoted(entry.filename)} is compressed or too large")
