"""``--set a.b=c``: single keys set from the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from internlm.config import keys
from internlm.config.legacy import OLD_KEYS, RENAMED
from internlm.config.messages import belongs_elsewhere
from internlm.config.tree import Tree, put
from internlm.utils.errors import Problem
from internlm.utils.nearest import did_you_mean

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
