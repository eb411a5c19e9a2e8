"""Lazy re-exports: a package offers a name that lives elsewhere and imports its home on first use.

This keeps ``import internlm`` light, and lets a lower package offer a name whose home is a higher layer without
importing that layer when it is itself imported (PEP 562).

Optional packages, asked for in one place.

A feature that needs one calls :func:`require` when it is used, never when its file is imported.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from internlm.utils.errors import Problem, UserError


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for ``package``, given ``{name: module that defines it}``."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__, lambda: sorted(homes)


@functools.cache
def why_missing(module: str) -> str:
    """Why ``module`` cannot be imported; empty where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native library may raise anything at all
        return f"{type(error).__name__}: {error}"
    return ""


def available(module: str) -> bool:
    """Whether ``module`` can be imported."""
    return not why_missing(module)


def require(module: str, wanted_by: str, install: str) -> ModuleType:
    """Import and return ``module``; a :class:`UserError` says what wanted it and how to install it."""
    if reason := why_missing(module):
        raise UserError(
            Problem(wanted_by, f"needs the package '{module}', which can't be imported ({reason})", f"Run: {install}")
        )
    return importlib.import_module(module)
