"""What a forward pass reads of layers without calling them.

A module hands out its parameters from a dict. While a forward pass is watched, the dict of a layer that is not being
called is one that tells when it is asked.
"""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn


class Reads:
    """Watches the forward passes of ``model`` until it is ended. ``layers``: what is called, each with the modules in
    it that have parameters of their own."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[nn.Module, Sequence[nn.Module]]]) -> None:
        self._owners = [owners for _, owners in layers]
        self._watched: dict[int, list[dict[str, Any]]] = {}  # by layer, the dicts that its modules have without us
        self._depth = 0  # of forward passes within one another
        self._beside: Counter[int] = Counter()
        self._last: tuple[int, Any] | None = None
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self._begin()),
            model.register_forward_hook(lambda *_: self._stop(), always_call=True),
        ]
        for number, (layer, _) in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(partial(self._on_call, number)))
            self._handles.append(layer.register_forward_hook(partial(self._on_return, number), always_call=True))

    def asked(self, layer: int, parameter: nn.Parameter) -> None:
        """Who has just read ``parameter`` of that layer saw to it that it is up to date."""
        if self._last is not None and self._last[0] == layer and self._last[1] is parameter:
            self._beside[layer] -= 1
            self._last = None

    def end(self) -> set[int]:
        """Watch no longer; the layers of which something was read, by somebody who did not ask, while they were not
        called."""
        self._leave_all()
        for handle in self._handles:
            handle.remove()
        return {layer for layer, count in self._beside.items() if count}

    def _begin(self) -> None:
        self._depth += 1
        if self._depth == 1:
            for number in range(len(self._owners)):
                self._watch(number)

    def _stop(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._leave_all()

    def _leave_all(self) -> None:
        for number in list(self._watched):
            self._leave(number)

    def _on_call(self, number: int, *_: Any) -> None:
        self._leave(number)

    def _on_return(self, number: int, *_: Any) -> None:
        if self._depth > 0:
            self._watch(number)

    def _watch(self, number: int) -> None:
        if number not in self._watched:
            owners = self._owners[number]
            self._watched[number] = [owner._parameters for owner in owners]
            for owner in owners:
                owner._parameters = _Telling(owner._parameters, partial(self._on_read, number))  # type: ignore[assignment]

    def _leave(self, number: int) -> None:
        for owner, parameters in zip(self._owners[number], self._watched.pop(number, ()), strict=False):
            owner._parameters = parameters

    def _on_read(self, number: int, what: Any) -> None:
        self._beside[number] += 1
        self._last = number, what


class _Telling(UserDict[str, Any]):
    """``content`` itself, but that whatever is taken from it is told."""

    def __init__(self, content: dict[str, Any], tell: Callable[[Any], None]) -> None:
        self.data, self._tell = content, tell

    def __getitem__(self, key: str) -> Any:
        self._tell(self.data[key])
        return self.data[key]
