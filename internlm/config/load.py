"""A Python config file becomes a dict of its config keys. The file runs with the rights of whoever loads it.

``--set a.b=c``: single keys set from the command line.
"""

from __future__ import annotations

import ast
import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from internlm.config import keys
from internlm.config.legacy import OLD_KEYS, RENAMED
from internlm.config.messages import belongs_elsewhere
from internlm.config.nested_dict import Tree, plain, put
from internlm.utils.errors import ConfigError, Problem, did_you_mean

#: What a file gets as a name of its own by ``from __future__ import annotations``.
FUTURE = type(annotations)

#: Upper-case names that are config keys all the same.
UPPER_CASE_KEYS = ("JOB_NAME",)


def load_file(path: str | Path) -> Tree:
    """Execute the config file ``path`` and return its config keys with their values.

    Config keys are the lower-case names at the top level, and ``JOB_NAME``. UPPER_CASE names, names with a leading
    underscore, modules, functions and classes are the file's own. Raises :class:`ConfigError` for a file that is
    missing or fails.
    """
    path = Path(path)
    code = _compile(path, _read(path))
    namespace: Tree = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(path, error)) from None
    return {name: plain(value) for name, value in namespace.items() if _is_config_key(name, value)}


def _is_config_key(name: str, value: Any) -> bool:
    if name in UPPER_CASE_KEYS:
        return True
    own = name.startswith("_") or name.isupper()
    return not own and not callable(value) and not isinstance(value, (ModuleType, FUTURE))


def _read(path: Path) -> bytes:
    if path.suffix != ".py" and os.path.exists(path):
        raise ConfigError(Problem(str(path), "not a Python file", "Give a config file that ends in .py"))
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except OSError as error:
        raise ConfigError(Problem(str(path), f"can't be read ({error.strerror})", "Give a readable file")) from None


def _missing(path: Path) -> Problem:
    folder = path.parent
    if not folder.is_dir():
        return Problem(str(path), f"no such file, nor is there a folder {folder.resolve()}", "Check the path")
    beside = [file.name for file in folder.glob("*.py")]
    todo = did_you_mean(path.name, beside) if beside else f"There is no .py file in {folder.resolve()}"
    return Problem(str(path), "no such file", todo)


def _compile(path: Path, source: bytes) -> CodeType:
    try:
        return compile(source, str(path), "exec")
    except SyntaxError as error:
        line = f"{error.text.strip()!r}: " if error.text else ""
        raise ConfigError(Problem(f"{path}:{error.lineno or 1}", f"{line}{error.msg}", "Mend the syntax")) from None
    except ValueError as error:  # null bytes, before Python 3.12
        raise ConfigError(Problem(str(path), str(error), "Give a Python file")) from None


def _failure(path: Path, error: BaseException) -> Problem:
    """The last line of the config file that ran, and the cause."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return Problem(f"{path}:{lines[-1]}", f"{type(error).__name__}: {error}", "Mend this line")


FLAG = "--set"


def parse_override(text: str) -> tuple[str, Any]:
    """``"a.b=c"`` -> ``("a.b", value)``: the value as a Python literal where it is one, else as text.

    Raises ValueError for a text without ``=`` or with an empty name in its key.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ValueError(f"{text!r} is not KEY=VALUE")
    return key, _literal_or_text(value.strip())


def _literal_or_text(text: str) -> Any:
    if text.lstrip("+-") in ("nan", "inf"):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def apply_overrides(tree: Tree, overrides: Iterable[str], problems: list[Problem]) -> set[str]:
    """Set each override in ``tree``, a later one over an earlier one; the keys that were set."""
    done = set()
    for text in overrides:
        try:
            key, value = parse_override(text)
        except ValueError as error:
            problems.append(Problem(FLAG, str(error), "Write it as in: --set model.num_layers=4"))
            continue
        key = RENAMED.get(key, key)
        if _is_known(key):
            put(tree, key, value)
            done.add(key)
        else:
            problems.append(Problem(f"{FLAG} {key}", "unknown key", _suggestion(key)))
    return done


def _is_known(key: str) -> bool:
    section, _, _ = key.rpartition(".")
    return key in keys.fields() or key in OLD_KEYS or keys.is_free_dict(section)


def _suggestion(key: str) -> str:
    """Where in other sections, or what within its own, the key may be; where that doesn't exist, the nearest of all."""
    section, _, _ = key.rpartition(".")
    if section and not keys.is_section(section):
        return did_you_mean(key, keys.fields())
    inside = [f"{section}.{child}" for child in keys.children(section)] if section else keys.fields()
    return belongs_elsewhere(key) or did_you_mean(key, inside)
