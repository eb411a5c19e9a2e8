"""Config files that build on other config files, under the name that published configs import from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
    before = set(names)
    try:
        yield
    finally:
        sys.path[:] = path
    # Python imports a file once. Copies keep what this config changes from the next config that builds on the file.
    names |= {name: _copy(value) for name, value in names.items() if name not in before}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
