"""Hooks that keep what modules give: outputs forward, and the gradients of those outputs backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from internlm.train.compile import is_compiled
from internlm.verify.record import Pass


@contextmanager
def watching(model: nn.Module, micro_batches: Iterable[int], calls: Iterable[int]) -> Iterator[list[Pass]]:
    """What the modules of ``model`` give within the block, forward and backward, in the micro-batches that are asked
    for: a pass for each. ``calls`` says which micro-batch each forward call of the model has; a model in chunks is
    called for each ``chunk``."""
    watch = _Watch(micro_batches, calls)
    handles = [model.register_forward_pre_hook(watch.begin, with_kwargs=True)]
    for name, module in watchable_modules(model):
        handles.append(module.register_forward_hook(partial(watch.called, name)))
    try:
        yield list(watch.passes.values())
    finally:
        for handle in handles:
            handle.remove()


def watchable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those whose output there is: a compiled block has no modules left in it, and a hook there would change what is
    compiled."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if is_compiled(module))
    return ((name, module) for name, module in model.named_modules() if not name.startswith(blocks))


class _Watch:
    """The first call of a module in a pass counts: a layer recomputed in backward is called again, and so is a norm
    that a linear does first. The gradient of the output comes from whichever of the calls is differentiated. Between
    forward and backward of a micro-batch there may be others; that a gradient comes tells whose backward it is."""

    def __init__(self, micro_batches: Iterable[int], calls: Iterable[int]) -> None:
        self.passes, self._calls = {number: Pass() for number in micro_batches}, iter(calls)
        self._current, self._forward, self._ends = Pass(), False, True

    def begin(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self._current, self._forward = self.passes.get(next(self._calls), Pass()), True
        part = getattr(model, "part", None)
        self._ends = part is None or part.is_last(inputs.get("chunk", 0))  # else it gives hidden units

    def called(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name or self._ends:
            self._note(name or "the model", output)
        if not name:  # the model itself: from here on whatever is called is called again
            self._forward = False

    def _note(self, name: str, output: Any) -> None:
        for key, tensor in tensors_in(output, name):
            if self._forward:
                self._current.outputs.setdefault(key, tensor.detach().clone())
            if tensor.requires_grad:
                tensor.register_hook(partial(self._differentiated, self._current, key))

    def _differentiated(self, its_pass: Pass, key: str, gradient: Tensor) -> None:
        self._current = its_pass
        its_pass.gradients.setdefault(key, gradient.detach().clone())


def tensors_in(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a module's output that can be compared element by element: no single numbers,
    which may be partial sums, and no truth values."""
    if isinstance(output, Tensor):
        if output.dim() and output.is_floating_point():
            yield name, output
    elif isinstance(output, dict) or hasattr(output, "_asdict"):
        for key, value in (output if isinstance(output, dict) else output._asdict()).items():
            yield from tensors_in(value, f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from tensors_in(value, f"{name}[{index}]")
