"""Hooks that record the tensors of a forward and backward pass, and the collectives that are called meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm.core.parallel.blocks import is_compiled
from internlm.core.parallel.ledger import LEDGER, Collective
from internlm.utils.errors import Problem, UserError
from internlm.verify.foreign_calls import observing
from internlm.verify.record import Call, Details, Pass, Site, host_copy

#: Largest number of elements of a tensor whose copy is kept when it is sent within a module.
MOST_ELEMENTS = 2**22
#: Most bytes that the tensors of a detailed record may take, which are in memory several times when they are sent.
MOST_BYTES = 2**32
#: Attribute of an output: name of the innermost module that returns it.
MADE_BY = "made_by"


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
        self._bytes = 0
        # Module that is running, forward or backward; None: none is.
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
            self._note(self._current, site, value)
        if value.requires_grad and torch.is_grad_enabled():
            # A hook on the tensor itself would get the sum over all modules that use it.
            value = value.view_as(value)
            caller = self._current.callers.get(site.module)
            value.register_hook(partial(self._differentiated, self._current, site, caller))
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
            self._note(self._current, site, tensor)
        # The hook of a parameter, which a module may return, would outlive the pass.
        if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
            # A module that returns the output of an inner one returns the same tensor, whose hooks run one by one:
            # it is the backward of the inner module that comes next.
            inner: str = tensor.__dict__.setdefault(MADE_BY, site.module)
            tensor.register_hook(partial(self._differentiated, self._current, site, inner))

    def _differentiated(self, its_pass: Pass, site: Site, next_module: str | None, gradient: Tensor) -> None:
        """Record the gradient at ``site``, after which the backward of ``next_module`` runs."""
        # Schedules run other micro-batches between forward and backward of this one. Modules that are recomputed next
        # belong to the micro-batch of this gradient.
        self._current, self._forward, self._module = its_pass, False, next_module
        self._note(its_pass, site._replace(is_gradient=True), gradient)

    def _note(self, its_pass: Pass, site: Site, tensor: Tensor) -> None:
        """Add a copy of the first tensor at ``site`` to a pass."""
        if site in its_pass.tensors:
            return
        its_pass.tensors[site] = host_copy(tensor)
        self._bytes += tensor.nbytes
        if self._details is not None and self._bytes > MOST_BYTES:
            message = f"the inputs and outputs of all modules take more than {MOST_BYTES / 2**30:g} GiB in a process"
            todo = "Use --debug-size, or lower data.seq_len or data.micro_num"
            raise UserError(Problem("internlm verify", message, todo))

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
    elif is_dataclass(output):
        for entry in fields(output):
            yield from tensors_in(getattr(output, entry.name), f"{name}.{entry.name}")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from tensors_in(value, f"{name}[{index}]")
