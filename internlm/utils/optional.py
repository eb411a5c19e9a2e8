"""Optional packages, asked for in one place.

A feature that needs one calls :func:`require` when it is used, never when its file is imported.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from internlm.utils.errors import Problem, UserError


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
