"""Config files that build on other config files, under the name that published configs import from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
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
    # While one config file imports another, the modules of the outer one are in use.
    if getattr(sys.modules.get(names.get("__name__", "")), "__dict__", None) is not names:
        _forget_others()
    before, modules = dict(names), set(sys.modules)
    try:
        yield
        _imported.update({name: _places(name) for name in set(sys.modules) - modules if "." not in name})
    finally:
        sys.path[:] = path
    # Python imports a file once. Copies keep what this config changes from the next config that builds on the file.
    names |= {name: _copy(value) for name, value in names.items() if value is not before.get(name)}


#: Map from a top-level module that a config file imported first to the places where Python found it.
_imported: dict[str, list[str]] = {}


def _forget_others() -> None:
    """Forget modules of earlier config files that are now found elsewhere, so that each folder has its own bases."""
    for top in [name for name, places in _imported.items() if places and _places(name) != places]:
        del _imported[top]
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            del sys.modules[name]


def _places(name: str) -> list[str]:
    """Return the file, or the folders, in which ``sys.path`` has the top-level module ``name``; empty if in none."""
    spec = PathFinder.find_spec(name)
    # A folder may be in sys.path more than once.
    return [] if spec is None else list(dict.fromkeys(spec.submodule_search_locations or [str(spec.origin)]))


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
