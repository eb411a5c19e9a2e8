"""Registries of callables by name, so that a config can choose a model by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from internlm.utils.errors import ConfigError, Problem, known_names


class Registry:
    """Map from names to callables (classes or functions).

    Register by a call, ``registry.register_module("NAME", cls)``, or by a decorator,
    ``@registry.register_module(module_name="NAME")``. Registering another callable under a taken name is an error:
    it would change the meaning of existing configs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._modules: dict[str, Callable[..., Any]] = {}

    def register_module(self, module_name: str, func: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Register ``func`` under ``module_name`` and return it; without ``func``, return a decorator that does this.

        Raises:
            KeyError: Another callable is registered under that name.
        """
        if func is None:
            return lambda decorated: self.register_module(module_name, decorated)
        known = self._modules.setdefault(module_name, func)
        if known is not func:
            raise KeyError(f"{self.name}: '{module_name}' is taken by {known!r}. Choose another name.")
        return func

    def get_module(self, module_name: str) -> Callable[..., Any]:
        """Return the callable registered under ``module_name``.

        Raises:
            ConfigError: No callable is registered under that name; the error lists the known names.
        """
        if module_name not in self._modules:
            # Names such as INTERNLM2 and INTERNLM3 are similar, but mean different models: suggest none.
            message = f"nothing is registered as {module_name!r}"
            raise ConfigError(Problem(self.name, message, known_names(self._modules)))
        return self._modules[module_name]

    def __contains__(self, module_name: object) -> bool:
        return module_name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)


#: Map from model types (``model_type`` in a config) to functions ``(config.model) -> nn.Module``.
MODEL_INITIALIZER = Registry("model_type")
