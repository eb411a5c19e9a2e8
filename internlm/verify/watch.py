"""Hooks that record the tensors of a forward and backward pass, and the collectives that are called meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm.core.parallel.blocks import is_compiled
from internlm.core.parallel.ledger import LEDGER, Collective
from internlm.verify.foreign_calls import observing
from internlm.verify.record import Call, Details, Pass, Site, host_copy

#: Largest number of elements of a tensor whose copy is kept when it is sent within a module.
MOST_ELEMENTS = 2**22


@contextmanager
def watching(
    model: nn.Module,
    micro_batches: Iterable[int],
    calls: Iterable[int],
    details: Details | None = None,
    before_pass: Callable[[], None] = lambda: None,
) -> Iterator[list[Pass]]:
    """Record the outputs of the modules of ``model`` in the ``with`` block, and the gradients of those outputs.

    Args:
        model: Model to record. A model with several chunks must be called with the keyword ``chunk``.
        micro_batches: Micro-batches to record.
        calls: Micro-batch of each forward call of the model.
        details: If given, the inputs of the modules, their gradients and all collectives are recorded too; those that
            belong to no recorded micro-batch are added to it.
        before_pass: Function called before each forward call of the model.

    Yields:
        One :class:`~internlm.verify.record.Pass` for each of ``micro_batches``, filled as the model runs.
    """
    watch = _Watch(micro_batches, calls, details, before_pass)
    handles = [model.register_forward_pre_hook(watch.begin, with_kwargs=True)]
    for name, module in watchable_modules(model):
        if details is not None:
            handles.append(module.register_forward_pre_hook(partial(watch.entered, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(watch.called, name)))
    try:
        with nullcontext() if details is None else _observing(watch, model):
            yield list(watch.passes.values())
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _observing(watch: _Watch, model: nn.Module) -> Iterator[None]:
    """Report to ``watch`` what hooks do not see: all collectives, and methods that are called instead of forward."""
    LEDGER.observer = lambda mode, collective, tensor: watch.communicated(mode.value, collective, tensor)
    entries = [
        (name, module, method)
        for name, module in watchable_modules(model)
        for method in getattr(module, "entry_points", ())
    ]
    for name, module, method in entries:
        setattr(module, method, partial(watch.method_called, name, module, getattr(module, method)))
    try:
        with observing(watch.communicated):
            yield
    finally:
        LEDGER.observer = None
        for _, module, method in entries:
            delattr(module, method)  # and so uncover that of its class


def watchable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each module of ``model`` that is not inside a compiled block.

    A compiled block inlines the modules inside it instead of calling them, and hooks on them would change the
    compiled code.
    """
    blocks = tuple(f"{name}." for name, module in model.named_modules() if is_compiled(module))
    return ((name, module) for name, module in model.named_modules() if not name.startswith(blocks))


class _Watch:
    """State of the hooks that record the tensors of modules and their gradients.

    If a module is called several times for one micro-batch, the tensors of the first call are recorded: a checkpointed
    layer is called again in the backward pass, and so is a norm that a linear recomputes. The gradient of a tensor
    comes from whichever of the calls is differentiated.
    """

    def __init__(
        self,
        micro_batches: Iterable[int],
        calls: Iterable[int],
        details: Details | None,
        before_pass: Callable[[], None],
    ) -> None:
        self.passes, self._calls = {micro_batch: Pass() for micro_batch in micro_batches}, iter(calls)
        self._details, self._before_pass = details, before_pass
        self._current, self._forward, self._returns_loss = Pass(), False, True
        # Where the pass is: name of the module, and whether it is in its backward.
        self._module: str | None = None

    def begin(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self._before_pass()
        self._current, self._forward = self.passes.get(next(self._calls), Pass()), True
        self._module = None
        stage_layers = getattr(model, "stage_layers", None)
        # Any other chunk returns hidden states, which have no equivalent on one process.
        self._returns_loss = stage_layers is None or stage_layers.is_last(inputs.get("chunk", 0))

    # -- a module -----------------------------------------------------------------------------------------------------
    def entered(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._forward:
            self._current.callers.setdefault(name, self._module)
            self._module = name
        given = tuple(self._note_input(Site(name, f"[{i}]", is_input=True), value) for i, value in enumerate(args))
        named = {key: self._note_input(Site(name, f".{key}", is_input=True), value) for key, value in kwargs.items()}
        return given, named

    def _note_input(self, site: Site, value: Any) -> Any:
        """Record an input, and return a view of it: its gradient is what this module alone contributes."""
        # A view of a parameter has neither its state nor its main gradient.
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return value
        if self._forward:
            self._current.tensors.setdefault(site, host_copy(value))
        if value.requires_grad and torch.is_grad_enabled():
            # A hook on the tensor itself would get the sum over all modules that use it.
            value = value.view_as(value)
            value.register_hook(partial(self._differentiated, self._current, site))
        return value

    def called(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name or self._returns_loss:
            for slot, tensor in tensors_in(output, ""):
                self._note_output(Site(name, slot), tensor)
        if self._forward:
            self._module = self._current.callers.get(name)
        if not name:  # the model itself has returned: whatever is called from here on is recomputation
            self._forward = False

    def method_called(self, name: str, module: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.entered(name, module, args, kwargs)
        output = method(*args, **kwargs)
        self.called(name, module, args, output)
        return output

    def _note_output(self, site: Site, tensor: Tensor) -> None:
        if self._forward:
            self._current.tensors.setdefault(site, host_copy(tensor))
        if tensor.requires_grad:
            tensor.register_hook(partial(self._differentiated, self._current, site))

    def _differentiated(self, its_pass: Pass, site: Site, gradient: Tensor) -> None:
        # Schedules run other micro-batches between forward and backward of this one. Modules that are recomputed next
        # belong to the micro-batch of this gradient.
        self._current, self._forward = its_pass, False
        self._module = its_pass.callers.get(site.module) if site.is_input else site.module
        its_pass.tensors.setdefault(site._replace(is_gradient=True), host_copy(gradient))

    # -- a collective -------------------------------------------------------------------------------------------------
    def communicated(self, mode: str, collective: Collective, tensor: Tensor) -> None:
        assert self._details is not None, "the observer is only set with details"
        # Copied before the collective, which may write to it; large ones are shards of weights.
        kept = tensor.numel() <= MOST_ELEMENTS and self._module is not None
        call = Call(self._module, not self._forward, mode, collective, host_copy(tensor) if kept else None)
        (self._details.calls if self._module is None else self._current.calls).append(call)


def tensors_in(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor in a module's output that can be compared element by element.

    Scalars are left out, since they may be partial sums, and so are boolean and integer tensors.
    """
    if isinstance(output, Tensor):
        if output.dim() and output.is_floating_point():
            yield name, output
    elif isinstance(output, dict) or hasattr(output, "_asdict"):
        for key, value in (output if isinstance(output, dict) else output._asdict()).items():
            yield from tensors_in(value, f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from tensors_in(value, f"{name}[{index}]")
