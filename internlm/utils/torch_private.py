"""Functions that torch.compile is not to look into.

``torch.compiler.disable`` says so too, but imports the compiler, which takes seconds, where the function is defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_reasons: dict[str, tuple[Callable[..., Any], str]] = {}
_disabled: dict[str, Callable[..., Any]] = {}


def uncompiled(reason: str) -> Callable[[F], F]:
    """Decorate a function that is called as it is from what is compiled; a graph ends there, for this ``reason``."""

    def decorate(function: F) -> F:
        name = f"{function.__module__}.{function.__qualname__}"
        _reasons[name] = function, reason

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            called = _disabled[name] if torch.compiler.is_compiling() else function
            return called(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def before_compiling() -> None:
    """Tell the compiler of all of them."""
    for name, (function, reason) in _reasons.items():
        _disabled[name] = torch.compiler.disable(function, reason=reason)
