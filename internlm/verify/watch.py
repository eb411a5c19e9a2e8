"""Hooks that keep what modules give: outputs forward, and the gradients of those outputs backward."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from internlm.verify.record import Pass


@contextmanager
def watching(model: nn.Module, micro_batches: Collection[int]) -> Iterator[list[Pass]]:
    """What the modules of ``model`` give within the block, in those of its forward calls whose numbers (from 0) are in
    ``micro_batches``, and in the backward passes that follow them."""
    watch = _Watch(micro_batches)
    handles = [model.register_forward_pre_hook(watch.begin)]
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(partial(watch.called, name)))
    try:
        yield watch.passes
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """The first call of a module in a pass counts: a layer recomputed in backward is called again, and so is a norm
    that a linear does first. The gradient of the output comes from whichever of the calls is differentiated."""

    def __init__(self, micro_batches: Collection[int]) -> None:
        self.micro_batches, self.passes = micro_batches, list[Pass]()
        self._calls, self._current, self._forward = 0, Pass(), False

    def begin(self, model: nn.Module, args: Any) -> None:
        self._current, self._forward = Pass(), True
        if self._calls in self.micro_batches:
            self.passes.append(self._current)
        self._calls += 1

    def called(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for key, tensor in tensors_in(output, name or "the model"):
            if self._forward:
                self._current.outputs.setdefault(key, tensor.detach().clone())
            if tensor.requires_grad:
                tensor.register_hook(partial(_keep, self._current.gradients, key))
        if not name:  # the model itself: from here on whatever is called is called again
            self._forward = False


def _keep(gradients: dict[str, Tensor], key: str, gradient: Tensor) -> None:
    gradients.setdefault(key, gradient.detach().clone())


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
