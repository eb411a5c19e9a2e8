"""Lazy imports: re-exports of names from other modules, and optional packages.

A lazy re-export keeps ``import internlm`` light, and lets a lower package export a name of a higher layer
without importing that layer (PEP 562). An optional package is imported by :func:`require` when a feature needs it,
never at the top of a file.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from internlm.utils.compat import refuse_replaced_import
from internlm.utils.errors import Problem, UserError


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create ``__getattr__`` and ``__dir__`` of a package whose re-exported names are imported on first use.

    Args:
        package: The package's ``__name__``.
        homes: Map from name to the module that defines it; ``""`` for a submodule of the package.

    Returns:
        The functions ``__getattr__`` and ``__dir__``, to be assigned in the package's ``__init__.py``.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            refuse_replaced_import(f"{package}.{name}")
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not homes[name]:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__, lambda: sorted(homes)


@functools.cache
def why_missing(module: str) -> str:
    """Return why ``module`` cannot be imported, or an empty string if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native library may raise anything, not only ImportError
        return f"{type(error).__name__}: {error}"
    return ""


def require(module: str, wanted_by: str, install: str) -> ModuleType:
    """Import and return an optional package.

    Args:
        module: Name of the module to import.
        wanted_by: Config key or feature that needs the package, for the error.
        install: Command that installs the package, for the error.

    Raises:
        UserError: The package cannot be imported.
    """
    if reason := why_missing(module):
        raise UserError(
            Problem(wanted_by, f"needs the package '{module}', which cannot be imported ({reason})", f"Run: {install}")
        )
    return importlib.import_module(module)
