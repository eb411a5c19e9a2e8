"""Folder of a local Hugging Face dataset: its text files, with the split and the dataset type of each.

Files are found at any depth. No file of the folder is executed, and nothing is downloaded.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import stat as stat_module
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from internlm.data.fingerprint import LEVELS, FileDigest, Level
from internlm.data.text_splits import SAVED, SAVED_SPLITS, Selection, saved_files, select_files
from internlm.utils.errors import DataError, Problem
from internlm.utils.logger import get_logger

#: Format of a file by its suffix.
FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
#: Files of the folder that hold no documents.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", SAVED_SPLITS, SAVED, "README.md", "config.json"}
#: Suffixes of files that other programs read texts from: leaving them out needs a warning.
UNSUPPORTED = {".csv", ".tsv", ".xml", ".md", ".html", ".tar", ".zip", ".xz", ".lz4", ".7z", ".rar", ".h5", ".lance"}
UNSUPPORTED |= {".avro", ".orc", ".feather", ".gz", ".zst", ".bz2", ".bin", ".pkl"}
#: Bytes of each of a file's samples in its fingerprint, and the number of samples.
SAMPLE_BYTES, SAMPLES = 4096, 4
THREADS = 16  # that open files, which mostly wait for the disk or the network


class TextFile(NamedTuple):
    """File of documents, with its size and modification time when the folder was opened."""

    path: Path
    name: str  # relative to the folder
    type_name: str
    format: str
    compression: str  # empty: none
    size: int  # bytes
    mtime_ns: int

    def check_unchanged(self) -> None:
        """Check that the file still has the size and the modification time that it had when the folder was opened.

        Raises:
            DataError: It has not, or cannot be read.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            message = f"cannot be read ({error.strerror})"
            raise DataError(Problem(str(self.path), message, "Restore the file and resume")) from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            message = f"the file has changed since it was opened ({self.size} bytes then, {stat.st_size} bytes now)"
            raise DataError(Problem(str(self.path), message, "Restore the original file, or start a new run"))


def find_text_files(folder: Path, selection: Selection) -> list[TextFile]:
    """Return the text files of a split, sorted by their path relative to ``folder``.

    Raises:
        DataError: The folder is missing or has no text file, or the split or the sub-set does not exist.
    """
    if not folder.is_dir():
        message = "expected a folder, got a file" if folder.exists() else "no such folder"
        raise DataError(Problem(str(folder), message, f"Set {selection.key} to an existing folder"))
    names, others = _walk(folder)
    if not names:
        suffixes = ", ".join([*FORMATS, *(f".jsonl{suffix}" for suffix in COMPRESSIONS)])
        instead = f", only {_some(others)}" if others else ""
        message = f"contains no text file (supported: {suffixes}){instead}"
        todo = f"Set {selection.key} to the folder of a dataset{', or convert its files' if others else ''}"
        raise DataError(Problem(str(folder), message, todo))
    if others:
        unread = any(PurePosixPath(name.lower()).suffix in UNSUPPORTED for name in others)
        log = get_logger().warning if unread else get_logger().info
        log(f"{folder}: {_some(others)} left out: unsupported type")
    types, unnamed, listed, named = select_files(folder, names, selection)
    if selection.is_trained_on and not named:
        message = f"{folder}: no path names a split, so validation reads the same files as training"
        get_logger().warning(f"{message}; set data.valid_folder to a folder of other files")
    if unnamed:
        get_logger().warning(f"{folder}: {_some(unnamed)} left out: no split in the path")
    if not listed and (notes := _notes(types)):
        types = {name: type_name for name, type_name in types.items() if name not in notes}
        message = f"{folder}: {_some(sorted(notes))} left out: taken for notes beside the dataset"
        get_logger().warning(f"{message}; to read them, list them in the configs of README.md")
    if garbled := [name for name in types.values() if not name.isprintable()]:
        message = f"the dataset type {garbled[0]!r} has control characters in its name"
        raise DataError(Problem(str(folder), message, "Rename the folder or the sub-set"))
    return [_text_file(folder, name, types[name]) for name in sorted(types)]


def digest_files(files: list[TextFile], level: Level) -> list[FileDigest]:
    """Digest files, several at a time: their sizes, samples of their content, and with level ``full`` every byte.

    Raises:
        DataError: A file cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_digest, files, itertools.repeat(level)))


def fingerprint(files: list[TextFile], digests: list[FileDigest], level: Level) -> str:
    """Return a digest of the names, types and digests of files, by level; a copy of the folder has the same."""
    names = [(file.name, file.type_name) for file in files]
    columns = zip(LEVELS[: LEVELS.index(level) + 1], zip(*digests, strict=True), strict=False)
    return " ".join(f"{name}:{_hex(repr((names, column)).encode())}" for name, column in columns)


def _digest(file: TextFile, level: Level) -> FileDigest:
    stat = _hex(str(file.size).encode())
    if level == "stat":
        return FileDigest(stat)
    # The same places whatever the content is, so that inserting a byte changes all samples but the first.
    last = max(file.size - SAMPLE_BYTES, 0)
    places = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
    try:
        with file.path.open("rb", buffering=0) as stream:
            sampled = _hex(b"".join(os.pread(stream.fileno(), SAMPLE_BYTES, place) for place in places))
            full = hashlib.blake2b(digest_size=12)
            while level == "full" and (content := stream.read(1 << 20)):
                full.update(content)
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(file.path), message, "Check the file and its permissions")) from error
    return FileDigest(stat, sampled, full.hexdigest() if level == "full" else "")


def _hex(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


# -- files ------------------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of all text files, and of the other files, relative to ``folder``, both sorted."""
    texts: list[str] = []
    others: list[str] = []
    for here, folders, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        # Hidden folders and __pycache__ hold no data; a link to a parent folder would be followed for ever.
        visible = (name for name in folders if not name.startswith((".", "__")))
        folders[:] = [name for name in visible if not real.is_relative_to((real / name).resolve())]
        saved = saved_files(Path(here)) if SAVED in names else None
        for name in names:
            if saved is not None and name.endswith(".arrow") and name not in saved:
                continue  # of what was saved there before
            # cache-*.arrow: results that `datasets` keeps beside the files of a saved dataset.
            if name[0] == "." or name in DESCRIPTIONS or fnmatch.fnmatch(name, "cache-*.arrow"):
                continue
            relative = Path(here, name).relative_to(folder).as_posix()
            (texts if _format(name)[0] else others).append(relative)
    return sorted(texts), sorted(others)


def _format(name: str) -> tuple[str, str]:
    """Return the format of a file by its name, and its compression, empty if there is none."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        found = FORMATS.get(PurePosixPath(path.stem).suffix, "")
        return (found, COMPRESSIONS[path.suffix]) if found in ("json", "text") else ("", "")
    return FORMATS.get(path.suffix, ""), ""


def _notes(types: dict[str, str]) -> set[str]:
    """Return the files of plain lines, such as a license, of a type that has at least as many files of records."""
    plain = {name for name in types if _format(name)[0] == "text"}
    lines = Counter(types[name] for name in plain)
    records = Counter(type_name for name, type_name in types.items() if name not in plain)
    return {name for name in plain if records[types[name]] >= lines[types[name]]}


def _text_file(folder: Path, name: str, type_name: str) -> TextFile:
    path = folder / name
    try:
        stat = path.stat()
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), message, "Check the file and its permissions")) from error
    if not stat_module.S_ISREG(stat.st_mode):
        # Opening a named pipe would block until another program writes to it.
        raise DataError(Problem(str(path), "is not a regular file", "Remove it"))
    return TextFile(path, name, type_name, *_format(name), stat.st_size, stat.st_mtime_ns)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{len(names)} file{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"
