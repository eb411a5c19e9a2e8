"""Splits and sub-sets of a local Hugging Face dataset: which of its files are read, and the dataset type of each.

The first of these that a folder has determines them, as in the ``datasets`` library:

1. Sub-sets that the front matter of its ``README.md`` lists under ``configs``.
2. Folders that ``DatasetDict.save_to_disk`` has written, with the splits in ``dataset_dict.json``.
3. Files called ``data/SPLIT-00000-of-00001``, with any name of a split.
4. Folders, or else file names, that contain a word such as ``train`` or ``validation``.

Without any of them, every file belongs to every split.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from internlm.utils.errors import DataError, Problem, known_names
from internlm.utils.lazy import require

#: Name of a split by the words that stand for it.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
DEFAULT_TYPE = "default"
#: Descriptions that ``save_to_disk`` writes beside the files of a dataset, and of a dict of splits.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
LARGEST_DESCRIPTION = 1 << 24  # bytes
LARGEST_README = 1 << 20  # bytes

#: Files of each pattern of each split of a sub-set.
Subset: TypeAlias = dict[str, dict[str, list[str]]]


class Selection(NamedTuple):
    """Part of a dataset folder to read, with the config keys that set it, for errors."""

    key: str  # of the folder
    split_key: str
    split: str
    subset: str | None  # None: all
    is_trained_on: bool = False  # whether training reads the folder, too


class Selected(NamedTuple):
    """Dataset type of each selected file, and the files that belong to no split."""

    types: dict[str, str]
    unnamed: list[str]
    listed: bool = False  # whether README.md lists the files
    named: bool = True  # whether there are splits


def select_files(folder: Path, names: list[str], selection: Selection) -> Selected:
    """Return the files of a split of a folder, of which ``names`` are all files, relative to it.

    Raises:
        DataError: The split or the sub-set does not exist, or ``README.md`` cannot be read or lists missing files.
    """
    # What the author of a dataset has written down is better than names of paths.
    if listed := _listed_subsets(folder, names):
        return Selected(_select_listed(folder, listed, selection), [], listed=True)
    if selection.subset is not None:
        message = f"no sub-set {selection.subset!r}: README.md of {folder} lists none"
        raise DataError(Problem("data.subset", message, f"Remove the key, or set {selection.key} to a sub-folder"))
    splits = _splits_of(folder, names)
    known = {split for split in splits.values() if split is not None}
    if not known:
        return Selected({name: _type_of(name, None) for name in names}, [], named=False)
    wanted = _matching(selection.split, known)
    if not wanted:
        message = f"{selection.split!r}, but {folder} has no such split"
        raise DataError(Problem(selection.split_key, message, known_names(known)))
    types = {name: _type_of(name, split) for name, split in splits.items() if split in wanted}
    return Selected(types, [name for name, split in splits.items() if split is None])


def saved_files(folder: Path) -> set[str] | None:
    """Return the names of the files of a dataset that was saved to a folder; None if there is none.

    Raises:
        DataError: A file is missing.
    """
    # Saved again with fewer files, a dataset does not remove the old ones.
    listed = _description(folder / SAVED).get("_data_files")
    if not isinstance(listed, list):
        return None
    names = {str(entry.get("filename")) for entry in listed if isinstance(entry, dict)}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        message = f"lists {missing[0]!r}, which is missing"
        raise DataError(Problem(str(folder / SAVED), message, "Restore the file from its source"))
    return names


def _matching(split: str, known: Collection[str]) -> set[str]:
    """Return the known splits with this name, or else those whose name means the same."""
    if split in known:
        return {split}
    return {name for name in known if SPLITS.get(name, name) == SPLITS.get(split, split)}


def _description(path: Path) -> dict[str, Any]:
    """Return the content of a small JSON file; empty if there is none, or something else."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            content = json.loads(stream.read(LARGEST_DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# -- splits and types named by paths ----------------------------------------------------------------------------------


def _splits_of(folder: Path, names: list[str]) -> dict[str, str | None]:
    """Return the split of each file; None if it has none."""
    saved = _saved_splits(folder, names)
    others = [name for name in names if name not in saved]
    # The numbered files of a single dataset that was saved to a folder called `data` name no split.
    numbered = {} if (folder / "data" / SAVED).is_file() else {name: SHARDED.fullmatch(name) for name in others}
    if any(numbered.values()):
        found: dict[str, str | None] = {name: match[1] if match else None for name, match in numbered.items()}
    else:
        found = {name: _word_of(PurePosixPath(name).parts[:-1]) for name in others}
        if not any(found.values()) and not saved:
            found = {name: _word_of(PurePosixPath(name).parts[-1:]) for name in others}
    return {name: saved.get(name, found.get(name)) for name in names}


def _saved_splits(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the split of each file in a folder that ``DatasetDict.save_to_disk`` has written."""
    dicts: dict[PurePosixPath, list[str]] = {}
    found = {}
    for name in names:
        path = PurePosixPath(name)
        for parent in path.parents:
            if parent not in dicts:
                splits = _description(folder / parent / SAVED_SPLITS).get("splits")
                dicts[parent] = splits if isinstance(splits, list) else []
            depth = len(parent.parts)
            if path.parts[depth] in dicts[parent] and len(path.parts) > depth + 1:
                found[name] = path.parts[depth]
    return found


def _word_of(parts: tuple[str, ...]) -> str | None:
    """Return the split that the first of some parts of a path names that names one."""
    words = (word for part in parts for word in BETWEEN_WORDS.split(part.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _type_of(name: str, split: str | None) -> str:
    """Return the dataset type: the first-level folder, apart from folders that name a split or are called ``data``."""
    parts = PurePosixPath(name).parts[:-1]
    return next((part for part in parts if part != split and part.lower() not in (*SPLITS, "data")), DEFAULT_TYPE)


# -- sub-sets listed in README.md -------------------------------------------------------------------------------------


def _listed_subsets(folder: Path, names: list[str]) -> dict[str, Subset]:
    """Return the sub-sets that README.md lists; empty without such a list."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as stream:
        text = stream.read(LARGEST_README).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    head, _, rest = text.partition("---\n")
    front, end, _ = rest.partition("\n---")
    if head.strip() or not end or "configs:" not in front:
        return {}
    yaml = require("yaml", f"configs of {readme}", "pip install pyyaml")
    try:
        content = yaml.safe_load(front)
        configs = (content.get("configs") if isinstance(content, dict) else None) or []
        return {_word(config["config_name"]): _listed_files(config, names) for config in configs}
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        message = f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        todo = "Correct the front matter, or remove its list of configs"
        raise DataError(Problem(f"{readme}: configs", message, todo)) from error


def _listed_files(config: dict[str, Any], names: list[str]) -> Subset:
    """Return the files of a sub-set, from its ``data_files`` or ``data_dir``."""
    files: Subset = {}
    inside = _word(config.get("data_dir", ".")).rstrip("/")
    prefix = "" if inside in ("", ".") else f"{inside.removeprefix('./')}/"
    if "data_files" not in config:
        for name in (name for name in names if name.startswith(prefix)):
            parts = PurePosixPath(name.removeprefix(prefix)).parts
            split = _word_of(parts[:-1]) or _word_of(parts[-1:]) or "train"
            files.setdefault(split, {}).setdefault(prefix, []).append(name)
        return files
    known = set(names)
    for split, pattern in _patterns(config["data_files"]):
        path = prefix + pattern.removeprefix("./")
        # Plain paths are looked up, since a list may have thousands of them.
        candidates = names if any(sign in path for sign in "*?[") else []
        found = [path] if path in known else [name for name in candidates if _matches(name, path)]
        files.setdefault(split, {})[path] = found
    return files


def _patterns(listed: Any) -> Iterator[tuple[str, str]]:
    """Yield the split and the pattern of each entry of ``data_files``: a pattern, or a dict with split and path."""
    for entry in listed if isinstance(listed, list) else [listed]:
        split, paths = (_word(entry["split"]), entry["path"]) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, _word(path)


def _word(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return str(value)


def _matches(name: str, pattern: str) -> bool:
    """Return whether a path matches a pattern, whose ``**`` stands for any number of folders."""
    parts, reached = PurePosixPath(name).parts, {0}
    # All numbers of parts that the beginning of the pattern can match, so that no pattern takes long.
    for wanted in PurePosixPath(pattern).parts:
        if wanted == "**":
            reached = set(range(min(reached), len(parts) + 1))
        else:
            reached = {n + 1 for n in reached if n < len(parts) and fnmatch.fnmatchcase(parts[n], wanted)}
        if not reached:
            return False
    return len(parts) in reached


def _select_listed(folder: Path, subsets: dict[str, Subset], selection: Selection) -> dict[str, str]:
    """Return the sub-set, which is the dataset type, of each file of the selected split."""
    if selection.subset is not None:
        if selection.subset not in subsets:
            message = f"{selection.subset!r}, but README.md of {folder} lists no such sub-set"
            raise DataError(Problem("data.subset", message, known_names(subsets)))
        subsets = {selection.subset: subsets[selection.subset]}
    types: dict[str, str] = {}
    for subset, splits in subsets.items():
        for split in _matching(selection.split, splits):
            for pattern, names in splits[split].items():
                if not names:
                    message = f"no text file matches {pattern!r}, of sub-set {subset!r} and split {split!r}"
                    raise DataError(Problem(f"{folder}/README.md", message, "Restore the files, or correct the list"))
                _add_listed(folder, types, names, subset)
    if not types:
        message = f"{selection.split!r}, but README.md of {folder} lists no file of this split"
        known = {split for splits in subsets.values() for split in splits}
        todo = known_names(known) if known else "Correct its list of configs"
        raise DataError(Problem(selection.split_key, message, todo))
    return types


def _add_listed(folder: Path, types: dict[str, str], names: list[str], subset: str) -> None:
    for name in names:
        if types.setdefault(name, subset) != subset:
            message = f"{name} belongs to the sub-sets {types[name]!r} and {subset!r}"
            raise DataError(Problem(str(folder), message, "Set data.subset to one of them"))
