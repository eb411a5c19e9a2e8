"""A Python config file becomes a dict of its config keys. The file runs with the rights of whoever loads it."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from internlm.config.tree import Tree, plain
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.nearest import did_you_mean

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
