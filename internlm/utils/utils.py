"""Config files that build on other config files, under the name that published configs import from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


def read_base() -> AbstractContextManager[None]:
    """Return a context in which a config file imports names from other config files.

    Modules are found as usual, and also from the working directory and from every folder above the config file::

        from internlm.utils.utils import read_base

        with read_base():
            from configs._base_.models.small import *

        model.update(num_layers=4)
    """
    return _base_of(sys._getframe(1).f_globals)


@contextmanager
def _base_of(names: dict[str, Any]) -> Iterator[None]:
    path = list(sys.path)
    # Last, so that no folder that happens to lie above a config file hides a package.
    sys.path += [os.getcwd(), *map(str, Path(os.path.abspath(names.get("__file__", ""))).parents)]
    importlib.invalidate_caches()
    searched, before, modules = set(sys.path) - set(path), dict(names), set(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = path
        _forget(modules, {*searched, os.getcwd()})
    # Copies keep what this config changes from another file of the same block that imports the same names.
    names |= {name: _copy(value) for name, value in names.items() if value is not before.get(name)}


def _forget(earlier: set[str], folders: set[str]) -> None:
    """Forget the modules from ``folders`` that are not among the ``earlier`` ones.

    Python imports a module once: a config of another folder would get the files of this one. Modules of installed
    packages stay, since not all of them can be imported twice.
    """
    new = {name for name in sys.modules if name not in earlier}
    found = {name for name in new if "." not in name and folders.intersection(_folders_of(sys.modules[name]))}
    for name in new:
        if name.partition(".")[0] in found:
            del sys.modules[name]


def _folders_of(module: ModuleType) -> list[str]:
    """Return the folders in which Python finds the top-level ``module``."""
    places = getattr(module, "__path__", None) or [getattr(module, "__file__", None) or ""]
    return [os.path.dirname(place) for place in places]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
