"""Load a Python config file as a dict of its config keys, and apply command-line overrides to it.

The file is executed with the rights of the user who loads it.
"""

from __future__ import annotations

import ast
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from internlm.config import keys
from internlm.config.legacy import OLD_KEYS, RENAMED
from internlm.config.messages import belongs_elsewhere, known_at_top_level
from internlm.config.nested_dict import NestedDict, plain, put, within
from internlm.utils.errors import ConfigError, Problem, did_you_mean
from internlm.utils.secrets import mask_urls_in
from internlm.utils.signal_thread import EndedBySignal

#: Type of the object that ``from __future__ import annotations`` binds in a file.
FUTURE = type(annotations)

#: Config keys in upper case. Any other upper-case name is a variable of the config file.
UPPER_CASE_KEYS = ("JOB_NAME",)

#: Command-line option for overrides, as named in messages.
OPTION = "--set"


# -- file -------------------------------------------------------------------------------------------------------------


def load_file(path: str | Path) -> NestedDict:
    """Execute a config file and return its config keys with their values.

    Config keys are the lower-case names at the top level, and ``JOB_NAME``. UPPER_CASE names, names with a leading
    underscore, modules, functions and classes are not config keys and are left out.

    Raises:
        ConfigError: The file is missing, is not Python, or fails when executed.
    """
    return from_mapping(execute_file(path))


def execute_file(path: str | Path) -> NestedDict:
    """Execute a config file and return its config keys and variables: all names but modules, functions and classes.

    The file can import modules that lie beside it, such as that of a model of the user's own.

    Raises:
        ConfigError: The file is missing, is not Python, or fails when executed.
    """
    path = Path(path)
    code = _compile(path, _read(path))
    # Any name but ``__main__``, so that an ``if __name__ == "__main__":`` block of the file does not run.
    namespace: NestedDict = {"__name__": path.stem, "__file__": str(path)}
    try:
        with _importing_from(path.resolve().parent):
            exec(code, namespace)
    except EndedBySignal:
        raise
    except (Exception, SystemExit) as error:  # any exception that the file raises is an error in the file
        raise ConfigError(_failure(path, error)) from None
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and not callable(value) and not isinstance(value, (ModuleType, FUTURE))
    }


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let imports in the ``with`` block find modules in ``folder``."""
    sys.path.append(str(folder))  # last, so that no file of the folder hides an installed module
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def from_mapping(mapping: Mapping[str, Any]) -> NestedDict:
    """Return the config keys of ``mapping``, copied; UPPER_CASE names and names with a leading underscore are left out.

    Raises:
        ConfigError: A dict contains itself, or a key is not a string.
    """
    # Variables are left out first: they may be of any type.
    given = {name: value for name, value in mapping.items() if name in UPPER_CASE_KEYS or not _is_own(name)}
    copied: NestedDict = plain(given, outer=(id(mapping),))
    return copied


def variables_of(mapping: Mapping[str, Any]) -> NestedDict:
    """Return the variables among the names of a config file: UPPER_CASE names with plain values."""
    own = {name: value for name, value in mapping.items() if isinstance(name, str) and name.isupper()}
    return {name: plain(value) for name, value in own.items() if name not in UPPER_CASE_KEYS and _is_plain(value)}


def _is_plain(value: Any, depth: int = 8) -> bool:
    """Return whether ``value`` consists of numbers, strings, None, lists, tuples and dicts."""
    # A config is compared, copied and sent to other processes; other values might support none of these. The depth is
    # limited because a list may contain itself.
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(key, str) and _is_plain(item, depth - 1) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, (str, int, float, os.PathLike))


def _is_own(name: Any) -> bool:
    return isinstance(name, str) and (name.startswith("_") or name.isupper())


def _read(path: Path) -> bytes:
    # A checkpoint folder or a YAML file would give a syntax error that explains nothing.
    if path.suffix != ".py" and os.path.exists(path):
        raise ConfigError(Problem(str(path), "not a Python file", "Pass a config file that ends in .py"))
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise ConfigError(Problem(str(path), message, "Check the path and its permissions")) from None


def _missing(path: Path) -> Problem:
    folder = path.parent
    if not folder.is_dir():
        message = f"no such file: the folder {folder.resolve()} does not exist"
        return Problem(str(path), message, "Correct the path")
    siblings = [file.name for file in folder.glob("*.py")]
    todo = did_you_mean(path.name, siblings) if siblings else f"Correct the path: {folder.resolve()} has no .py file"
    return Problem(str(path), "no such file", todo)


def _compile(path: Path, source: bytes) -> CodeType:
    try:
        return compile(source, str(path), "exec")
    except SyntaxError as error:
        line = f"{mask_urls_in(error.text.strip())!r}: " if error.text else ""
        todo = f"Check with: python -m py_compile {path}"
        raise ConfigError(Problem(f"{path}:{error.lineno or 1}", f"{line}{error.msg}", todo)) from None
    except ValueError as error:  # null bytes, before Python 3.12
        raise ConfigError(Problem(str(path), str(error), "Pass a Python source file")) from None


def _failure(path: Path, error: BaseException) -> Problem:
    """Convert an exception raised in a config file to a problem located at that file's innermost traceback line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    message = f"{type(error).__name__}: {mask_urls_in(str(error))}"
    return Problem(f"{path}:{lines[-1]}", message, f"For the traceback, run: python {path}")


# -- overrides --------------------------------------------------------------------------------------------------------
def parse_override(text: str) -> tuple[str, Any]:
    """Split ``"a.b=c"`` into key and value.

    The value is parsed as a Python literal. It stays a string if it is none, or if the key takes a string.

    Raises:
        ValueError: ``text`` has no ``=``, or its dotted key has an empty part.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not all(key.split(".")):
        raise ValueError(f"expected KEY=VALUE, got {mask_urls_in(text)!r}")
    literal = _literal_or_text(value)
    if literal is None or isinstance(literal, str):
        return key, literal
    return key, value if key in keys.fields() and keys.takes(key, str) else literal


def _literal_or_text(text: str) -> Any:
    if text.lstrip("+-") in ("nan", "inf"):  # floats that Python has no literals for
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def apply_overrides(config: NestedDict, overrides: Iterable[str], problems: list[Problem]) -> set[str]:
    """Apply ``overrides`` to ``config`` in order.

    Args:
        config: Config keys; modified in place.
        overrides: Strings ``"key=value"``.
        problems: List to which malformed overrides and unknown keys are appended.

    Returns:
        The dotted keys that were set.
    """
    done = set()
    for text in overrides:
        try:
            key, value = parse_override(text)
            value = plain(value, key)
        except ValueError as error:
            problems.append(Problem(OPTION, str(error), "Example: --set model.num_layers=4"))
            continue
        except ConfigError as error:
            problems += error.problems
            continue
        # Renamed keys are set under their new names; other old spellings are normalised afterwards.
        if key in RENAMED:
            key, value = RENAMED[key].key, RENAMED[key].convert(value)
        if not _is_known(key):
            problems.append(Problem(f"{OPTION} {key}", "unknown key", _suggestion(key)))
        elif expression := _expression_problem(key, value):
            problems.append(expression)
        else:
            put(config, key, value)
            done.add(key)
    return done


def _expression_problem(key: str, value: Any) -> Problem | None:
    """Return what is wrong with a value that is a Python expression but no literal, unless the key takes a string."""
    if not isinstance(value, str) or key not in keys.fields() or keys.takes(key, str):
        return None
    try:
        tree = ast.parse(value, mode="eval")
        nodes = [type(node) for node in ast.walk(tree)]
        literal = ast.unparse(_DictCalls().visit(tree))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if ast.Call not in nodes and (ast.Name in nodes or ast.Constant not in nodes):  # a word, such as torch.bfloat16
        return None
    message = f"{keys.format_value(key, value)} is an expression, but only literals are evaluated"
    if isinstance(_literal_or_text(literal), str):
        return Problem(f"{OPTION} {key}", message, f"Set it to {keys.expected(key)}")
    return Problem(f"{OPTION} {key}", message, mask_urls_in(f'Write it as {OPTION} "{key}={literal}"'))


class _DictCalls(ast.NodeTransformer):
    """Transformer that replaces calls ``dict(key=value)`` by ``{"key": value}``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        if not (isinstance(node.func, ast.Name) and node.func.id == "dict") or node.args or None in names:
            return node
        return ast.Dict([ast.Constant(name) for name in names], [keyword.value for keyword in node.keywords])


def _is_known(key: str) -> bool:
    section, _, _ = key.rpartition(".")
    return key in keys.fields() or within(key, OLD_KEYS) or keys.is_free_dict(section)


def _suggestion(key: str) -> str:
    """Suggest known keys for the unknown ``key``: its name in other sections, or a similar key in its own section."""
    section, _, _ = key.rpartition(".")
    if section and not keys.is_section(section):
        return did_you_mean(key, keys.fields(), known_at_top_level())
    if not section:
        return belongs_elsewhere(key) or did_you_mean(key, keys.fields(), known_at_top_level())
    return belongs_elsewhere(key) or did_you_mean(key, [f"{section}.{child}" for child in keys.children(section)])
