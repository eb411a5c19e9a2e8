"""Watch over all operators of a step on the pretended device: memory, kernels, products, collectives and faults.

A fault is an operator that would stall or fail on a device: a read of a device value that is not counted
(:func:`internlm.accelerator.to_host`), a blocking copy, or a tensor that the host computes.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import internlm
from internlm.accelerator.pretended import NAME, in_host_memory
from internlm.core.scheduler.executor import ActionMarks
from internlm.costs.memory_plan import ACTIVATIONS, GATHER, REDUCTION, TRANSIENTS
from internlm.dryrun.call_order import Call, call_of
from internlm.dryrun.device_memory import DeviceMemory
from internlm.ops import cpu as cpu_kernels
from internlm.utils.torch_private import TorchDispatchMode, call_uncached

_PACKAGE = str(Path(internlm.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
#: Folder of the kernels for the CPU, which a device must not reach.
_CPU_KERNELS = str(Path(cpu_kernels.__file__).parent)
#: Folders whose lines no report names, but their callers.
_OWN = (_CPU_KERNELS, *(str(Path(_PACKAGE) / name) for name in ("dryrun", "accelerator", "utils")))
#: Categories of the storages that a file makes, by the end of its path.
_MADE_IN = {
    "core/parallel/weight_gatherer.py": GATHER,
    "_fully_shard/_fsdp_param_group.py": GATHER,
    "solver/optimizer/grad_reduce.py": REDUCTION,
}
#: Operators that only reserve memory.
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
#: Operators that return a value of a device tensor, and the value that they return here.
_READS: dict[str, Any] = {"aten::_local_scalar_dense": 0, "aten::is_nonzero": True, "aten::equal": True}
#: Matrix products, with the positions of their factors.
_PRODUCTS = {f"aten::{name}": (0, 1) for name in ("mm", "bmm")}
_PRODUCTS |= {f"aten::{name}": (1, 2) for name in ("addmm", "addmm_", "baddbmm", "baddbmm_")}
_COPIES = {"aten::_to_copy", "aten::copy_"}


class DeviceWatch(TorchDispatchMode):
    """Record of all operators that run within the ``with`` block; it must be entered within fake tensors.

    Args:
        rank: Rank whose code runs.
        fakes: Result of ``fake_tensors``.
    """

    def __init__(self, rank: int, fakes: Any) -> None:
        super().__init__()
        self.rank, self.fakes = rank, fakes
        self.memory = DeviceMemory(NAME, _category, place)
        self.kernels: Counter[str] = Counter()
        """Number of kernels launched, by operator. Some operators launch several kernels, which count as one."""
        self.flops: Counter[str] = Counter()
        """Floating-point operations of the matrix products of ended actions, by operator."""
        self._flops_since_action: Counter[str] = Counter()
        self.events: list[Call] = []
        self.faults: Counter[str] = Counter()
        """Number of occurrences of each fault, with the line of code."""

    def start_step(self) -> None:
        """Forget kernels, operations and the peak of earlier steps."""
        self.kernels.clear()
        self.flops.clear()
        self._flops_since_action.clear()
        self.memory.start_peak()

    def end_action(self, marks: ActionMarks) -> None:
        """Count what an action of the schedule computed, and keeps for another action.

        Products outside of actions are those of an optimizer, such as Muon, which no formula of the model has.
        """
        del marks
        self.flops += self._flops_since_action
        self._flops_since_action.clear()
        self.memory.end_action(ACTIVATIONS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operator, and record it."""
        kwargs = kwargs or {}
        if any(issubclass(argument_type, DTensor) for argument_type in types):
            return NotImplemented  # DTensor calls the operators of its local tensors, which come here
        if func.namespace == "prim" or in_host_memory():
            return func(*args, **kwargs)
        name = func._schema.name
        if func.namespace == "c10d":
            self.events.append(call_of(func, args, self.rank))
            return func(*args, **kwargs)
        if name in _READS and any(_on_device(tensor) for tensor in args if isinstance(tensor, Tensor)):
            self._fault("reads a value of a device tensor (.item(), int(), if)")
            return _READS[name]
        target = kwargs.get("device") if name == "aten::_to_copy" else None
        if target is not None and torch.device(target).type == NAME and not _on_device(args[0]):
            return self._copy_to_device(args[0], kwargs)
        before = [_on_device(tensor) for tensor in args if isinstance(tensor, Tensor)]
        takes_storage = name == "aten::set_"
        out = call_uncached(self.fakes, func, args, kwargs) if takes_storage else func(*args, **kwargs)
        if not func.is_view and not takes_storage:
            self._record(func, name, args, kwargs, out, before)
        return out

    def _copy_to_device(self, tensor: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Return a tensor on the device instead of a copy of ``tensor``, whose values may exist."""
        if not options.get("non_blocking"):
            self._fault("copies a host tensor with a blocking copy. Use accelerator.to_device")
        dtype = options.get("dtype") or tensor.dtype
        out = torch.empty(tensor.shape, dtype=dtype, device=options["device"])
        self.memory.see(out)
        self.kernels["aten::_to_copy"] += 1
        return out

    def _record(
        self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, before: Sequence[bool]
    ) -> None:
        outputs = out if isinstance(out, (list, tuple)) else [out]
        tensors = [output for output in outputs if isinstance(output, Tensor)]
        for tensor in tensors:
            self.memory.see(tensor)
        after = [_on_device(tensor) for tensor in tensors]
        non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
        is_async = non_blocking or kwargs.get("pin_memory")
        if tensors and not any(after):
            if any(before) and not is_async:
                self._fault(f"copies a device tensor to the host ({name}). Use accelerator.to_host")
            elif not any(before) and not kwargs.get("pin_memory"):
                self._fault(f"computes on the host ({name}). Create the tensor on the device")
            return
        if not any(before) and not any(after):
            return
        if any(file.startswith(_CPU_KERNELS) for file, _ in _frames()):
            self._fault("runs a kernel of internlm.ops.cpu on device tensors. Choose the kernel by their device")
        if name in _COPIES and not all(before) and not is_async:
            self._fault("copies a host tensor with a blocking copy. Use accelerator.to_device")
        if name not in _ALLOCATIONS:
            self.kernels[name] += 1
        if name in _PRODUCTS:
            left, right = (args[index] for index in _PRODUCTS[name])
            self._flops_since_action[name] += 2 * left.numel() * right.shape[-1]

    def _fault(self, message: str) -> None:
        self.faults[f"{place()}: {message}"] += 1

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Count storages that are resized within the ``with`` block.

        ``fully_shard`` frees and allocates its gathered parameters in this way, for which torch has no operator and no
        hook.
        """
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self.memory.resized(storage)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _frames() -> Iterator[tuple[str, int]]:
    """Yield file and line of each running function, the innermost first."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def place() -> str:
    """Return ``file:line`` of the innermost running line that is neither torch's nor that of the dry run itself."""
    return next((_format(file, line) for file, line in _frames() if _is_shown(file)), "autograd")


def place_of(error: BaseException) -> str:
    """Return ``file:line`` of the innermost line of the traceback of ``error`` that :func:`place` would return."""
    lines = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    return next((_format(file, line) for file, line in reversed(lines) if _is_shown(file)), "autograd")


def _is_shown(file: str) -> bool:
    return not file.startswith((_TORCH, *_OWN))


def _format(file: str, line: int) -> str:
    return f"{file.removeprefix(_PACKAGE.removesuffix('internlm'))}:{line}"


def _category() -> str:
    """Return the category of a storage that is created now."""
    for file, _ in _frames():
        for end, category in _MADE_IN.items():
            if file.endswith(end):
                return category
    return TRANSIENTS
