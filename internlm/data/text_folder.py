"""Folder of a local Hugging Face dataset: its text files, with the split and the dataset type of each.

Files are found at any depth. Sub-sets are those that the front matter of the folder's ``README.md`` lists under
``configs``. Without such a list, the split of a file is named by its path: a folder or a word of the file name, such as
``train`` or ``validation``. If no path names a split, every file belongs to every split.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from internlm.data.fingerprint import LEVELS, FileDigest, Level
from internlm.utils.errors import DataError, Problem, known_names
from internlm.utils.lazy import require
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
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.md"}
#: Name of a split by the words that stand for it.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORDS = re.compile(r"[^\W_]+")
DEFAULT_TYPE = "default"
LARGEST_README = 1 << 20  # bytes
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


class Selection(NamedTuple):
    """Part of a dataset folder to read, with the config keys that set it, for errors."""

    key: str  # of the folder
    split_key: str
    split: str
    subset: str | None  # None: all


def find_text_files(folder: Path, selection: Selection) -> list[TextFile]:
    """Return the text files of a split, sorted by their path relative to ``folder``.

    Raises:
        DataError: The folder is missing or has no text file, or the split or the sub-set does not exist.
    """
    if not folder.is_dir():
        raise DataError(Problem(str(folder), "no such folder", f"Set {selection.key} to an existing folder"))
    names, others = _walk(folder)
    if not names:
        suffixes = ", ".join([*FORMATS, *(f".jsonl{suffix}" for suffix in COMPRESSIONS)])
        message = f"contains no text file (supported: {suffixes})"
        raise DataError(Problem(str(folder), message, f"Set {selection.key} to the folder of a dataset"))
    if others:
        get_logger().info(f"{folder}: {_some(others)} of unsupported types are left out")
    # What the author of a dataset has written down is better than names of paths.
    listed = _listed_subsets(folder, names)
    if listed:
        types = _select_listed(folder, listed, selection)
    else:
        if selection.subset is not None:
            message = f"no sub-set {selection.subset!r}: README.md of {folder} lists none"
            raise DataError(Problem("data.subset", message, f"Remove the key, or set {selection.key} to a sub-folder"))
        types = _select_by_path(folder, names, selection)
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
        # Hidden folders hold caches; a link to a parent folder would be followed for ever.
        folders[:] = [f for f in folders if f[0] not in "._" and not real.is_relative_to((real / f).resolve())]
        for name in names:
            # cache-*.arrow: results that `datasets` keeps beside the files of a saved dataset.
            if name[0] in "._" or name in DESCRIPTIONS or fnmatch.fnmatch(name, "cache-*.arrow"):
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


def _text_file(folder: Path, name: str, type_name: str) -> TextFile:
    path = folder / name
    try:
        stat = path.stat()
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), message, "Check the file and its permissions")) from error
    return TextFile(path, name, type_name, *_format(name), stat.st_size, stat.st_mtime_ns)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{len(names)} files ({shown}{', ...' if len(names) > 3 else ''})"


# -- splits and types named by paths ----------------------------------------------------------------------------------


def _select_by_path(folder: Path, names: list[str], selection: Selection) -> dict[str, str]:
    """Return the dataset type of each file of the selected split."""
    splits = {name: _split_of(name) for name in names}
    known = set(splits.values()) - {None}
    wanted = SPLITS.get(selection.split, selection.split)
    if not known:
        return {name: _type_of(name) for name in names}
    if wanted not in known:
        message = f"{selection.split!r}, but {folder} has no such split"
        raise DataError(Problem(selection.split_key, message, known_names(str(name) for name in known)))
    if unnamed := [name for name, split in splits.items() if split is None]:
        get_logger().warning(f"{folder}: {_some(unnamed)} belong to no split by their paths and are left out")
    return {name: _type_of(name) for name, split in splits.items() if split == wanted}


def _split_of(name: str) -> str | None:
    """Return the split that a path names, by its outermost folder that does, or by its file name."""
    for part in PurePosixPath(name.lower()).parts:
        for word in WORDS.findall(part):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _type_of(name: str) -> str:
    """Return the dataset type: the first-level folder, apart from folders that name a split or are called ``data``."""
    parts = PurePosixPath(name).parts[:-1]
    return next((part for part in parts if part.lower() not in (*SPLITS, "data")), DEFAULT_TYPE)


# -- sub-sets listed in README.md -------------------------------------------------------------------------------------


def _listed_subsets(folder: Path, names: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the files of each split of each sub-set that README.md lists; empty without such a list."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as stream:
        head, _, rest = stream.read(LARGEST_README).decode(errors="replace").partition("---\n")
    front, end, _ = rest.partition("\n---")
    if head.strip() or not end or "configs:" not in front:
        return {}
    yaml = require("yaml", f"configs of {readme}", "pip install pyyaml")
    try:
        configs = yaml.safe_load(front)["configs"]
        return {str(config["config_name"]): _listed_files(config, names) for config in configs}
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        message = f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        todo = "Correct the front matter, or remove its list of configs"
        raise DataError(Problem(f"{readme}: configs", message, todo)) from error


def _listed_files(config: dict[str, Any], names: list[str]) -> dict[str, list[str]]:
    """Return the files of each split of a sub-set, from its ``data_files`` or ``data_dir``."""
    inside = str(config.get("data_dir", ".")).rstrip("/")
    prefix = "" if inside in ("", ".") else f"{inside.removeprefix('./')}/"
    files: dict[str, list[str]] = {}
    if "data_files" not in config:
        for name in (name for name in names if name.startswith(prefix)):
            files.setdefault(_split_of(name.removeprefix(prefix)) or "train", []).append(name)
        return files
    for split, pattern in _patterns(config["data_files"]):
        pattern = prefix + pattern.removeprefix("./")
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))]
        files.setdefault(SPLITS.get(split, split), []).extend(found)
    return files


def _patterns(listed: Any) -> Iterator[tuple[str, str]]:
    """Yield the split and the pattern of each entry of ``data_files``: a pattern, or a dict with split and path."""
    for entry in listed if isinstance(listed, list) else [listed]:
        split, paths = (str(entry["split"]), entry["path"]) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, str(path)


def _select_listed(folder: Path, subsets: dict[str, dict[str, list[str]]], selection: Selection) -> dict[str, str]:
    """Return the sub-set, which is the dataset type, of each file of the selected split."""
    if selection.subset is not None:
        if selection.subset not in subsets:
            message = f"{selection.subset!r}, but README.md of {folder} lists no such sub-set"
            raise DataError(Problem("data.subset", message, known_names(subsets)))
        subsets = {selection.subset: subsets[selection.subset]}
    wanted = SPLITS.get(selection.split, selection.split)
    types: dict[str, str] = {}
    for subset, splits in subsets.items():
        for name in splits.get(wanted, []):
            if types.setdefault(name, subset) != subset:
                message = f"{name} belongs to the sub-sets {types[name]!r} and {subset!r}"
                raise DataError(Problem(str(folder), message, "Set data.subset to one of them"))
    if not types:
        known = {split for splits in subsets.values() for split, files in splits.items() if files}
        message = f"{selection.split!r}, but README.md of {folder} lists no file of this split"
        raise DataError(Problem(selection.split_key, message, known_names(known)))
    return types
