"""All private symbols of PyTorch that the project uses, each with its reason and its possible replacement.

No other file of the package uses an underscore name of torch, so that a new release breaks only this file and its test
(``tests/unit/utils/test_torch_private.py``), which names the changed symbol. Symbols whose modules load the compiler,
which takes seconds, are imported when they are first used.
"""

from __future__ import annotations

import ctypes
import functools
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Base class and registration of objects that are passed to a custom operator without being traced by the compiler.
# Use the public names under torch.library instead once opaque objects leave their beta.
from torch._library.opaque_object import register_opaque_type as register_opaque_type
from torch._opaque_base import OpaqueBase as OpaqueBase

# Base class of modes that see each operator, which torch documents but has in a private module.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

F = TypeVar("F", bound=Callable[..., Any])

# -- autograd ---------------------------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Return whether the calling thread runs within a backward pass of autograd.

    A matmul of the forward computation that runs within a backward pass belongs to a recomputed block. Module hooks
    cannot detect this: they run in both passes, and if a pass raises, no hook marks its end.

    Remove this function once torch has a public function that returns the current graph task.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Queue ``callback`` to run at the end of the current backward pass; it is dropped if the pass raises.

    FSDP2 queues a callback in the same way. A ``register_full_backward_hook`` on the first block would not do, because
    it never runs if that block is frozen.

    Remove this function once the autograd engine has a public callback for the end of a backward pass.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# -- kernels without a public Python name -----------------------------------------------------------------------------


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` with oneDNN: [M, K], [N, K] → [M, N].

    ``torch.mm`` in float32 calls the BLAS that torch was built with, which may leave AVX-512 units unused.

    Remove this function once torch has a public switch that routes float32 matmuls on the CPU to oneDNN.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def onednn_weight(weight: Tensor) -> Tensor:
    """Return a copy of ``weight``, [N, K], in the layout in which :func:`onednn_linear` is fastest for few rows of x.

    The compiler packs the weights of a frozen graph with this operator.

    Remove this function once torch has a public function that packs the weight of a linear.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # for about 16 rows
    return packed


def softmax_backward(dprobs: Tensor, probs: Tensor) -> Tensor:
    """Compute the gradient of a softmax over the last dimension from its output ``probs``, in one kernel.

    All tensors have the shape [..., N]. If torch removes its private function, compute
    ``probs * (dprobs - (dprobs * probs).sum(-1, keepdim=True))``, which takes three passes over memory.
    """
    dscores: Tensor = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
    return dscores


# Kernels over lists of tensors: on CUDA, one launch for all parameters of a group instead of one per parameter. Only
# the unary ones (abs, exp, …) are documented. If torch removes the others, loop over the list: the results are equal.
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp = torch._foreach_lerp
foreach_mul_ = torch._foreach_mul_
foreach_zero_ = torch._foreach_zero_

# -- dry runs ---------------------------------------------------------------------------------------------------------


def register_python_device(name: str, module: object) -> None:
    """Register a device type without kernels, on which fake tensors can be.

    If torch removes its experimental function, register the device's hooks and guard as its C++ extensions do.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(name, backend_module=module)
    # An operator with a kernel of its own is called as it is; without, torch replaces it by many small operators. Torch
    # chooses the kernel of attention in C++, from devices that it has been built for.
    library = torch.library.Library("aten", "IMPL")
    for operator in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        library.impl(operator, _never_called, "PrivateUse1")
    library.impl("scaled_dot_product_attention", _attention_in_one_kernel, "AutogradPrivateUse1")
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # a library that is freed removes its kernels


def _attention_in_one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Call the operator that CUDA would choose: FlashAttention, or for float32 or a mask the memory-efficient one."""
    aten, qkv, scale = torch.ops.aten, (query, key, value), options.get("scale")
    out: Tensor
    if query.dtype == torch.float64:  # only plain operators serve it
        out = aten._scaled_dot_product_attention_math(*qkv, attn_mask, dropout_p, is_causal, **options)[0]
    elif attn_mask is None and query.dtype != torch.float32:
        out = aten._scaled_dot_product_flash_attention(*qkv, dropout_p, is_causal, scale=scale)[0]
    else:
        efficient, saves_sums = aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
        out = efficient(*qkv, attn_mask, saves_sums, dropout_p, is_causal, scale=scale)[0]
    return out


def _never_called(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("fake tensors do not call kernels")


@contextmanager
def fake_tensors() -> Iterator[Any]:
    """Make all tensors that are created in the ``with`` block fake: they have shape, dtype and device, but no values.

    The context manager returns the mode, for :func:`call_uncached`.

    Fake tensors are private, but are what ``torch.export`` is built on. If their class moves, import it from there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch._C._only_lift_cpu_tensors()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) then calls operators that modes see
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def call_uncached(mode: Any, operator: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator without the cache of the mode, which would keep a storage among its arguments alive.

    Call the operator itself once the cache leaves out such operators.
    """
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        return operator(*args, **kwargs)
    finally:
        mode.cache_enabled = before


@contextmanager
def real_tensors() -> Iterator[None]:
    """Make tensors that are created in the ``with`` block real again, inside :func:`fake_tensors`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def errors_of_fake_tensors() -> tuple[type[Exception], ...]:
    """Return the exceptions of operators that cannot run without values, or on these devices.

    Like the class of fake tensors, they are private.
    """
    from torch._subclasses import fake_tensor

    return (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.FakeTensorDeviceMismatchError,
        fake_tensor.UnsupportedOperatorException,
        NotImplementedError,  # of a kernel that the pretended device lacks
    )


def join_fake_group(rank: int, world_size: int) -> None:
    """Make a default process group whose collectives send nothing and leave their outputs as they are.

    torch offers it for tests. If it is removed, derive a class from ``torch.distributed.ProcessGroup``.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


# -- torch.distributed ------------------------------------------------------------------------------------------------


def default_store() -> dist.Store:
    """Return the rendezvous store of the default process group.

    The store works even if collectives do not: after a peer failure, ranks exchange their observations through it.
    If torch removes its private function, open a separate ``TCPStore`` on another port.

    Raises:
        ValueError: There is no process group.
    """
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


@functools.cache
def _cpp_log_level() -> tuple[ctypes.c_int, int]:
    """Return the level below which torch's C++ code logs nothing, as a variable, and its value."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # another system, or another build: the logs stay
        level = ctypes.c_int()
    return level, level.value


@contextmanager
def without_cpp_logs() -> Iterator[None]:
    """Keep torch's C++ code from logging in the ``with`` block, in all threads, except for fatal errors.

    Python code has no other way to do so once torch has been imported. The logs of a store's client hold a stack trace
    of tens of lines for each failure. If the variable is gone, redirect the file descriptor of stderr in the block.
    """
    level, value = _cpp_log_level()
    level.value = 3
    try:
        yield
    finally:
        level.value = value  # not that before the block, which may be the one of another thread's block


#: Classes and functions that the pickled metadata of ``torch.distributed.checkpoint`` refers to, by module and name.
#: An allow-list keeps a checkpoint from running code. A metadata format without code would need no such list.
CHECKPOINT_METADATA_NAMES = frozenset(
    {
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"),
    }
)


@contextmanager
def deciding_on_restarts(
    may_restart: Callable[[Mapping[int, int], int], bool], exit_codes: dict[int, int | None]
) -> Iterator[None]:
    """Let ``may_restart`` decide in the ``with`` block whether torchrun's API restarts the ranks after a failure.

    torchrun itself restarts the ranks after any failure, also after one that a restart cannot change. Its errors after
    a signal to the launcher, and after the loss of the rendezvous store, have no exit codes.

    Remove this function once torchrun has an option for exit codes that end a job, and those errors have exit codes.

    Args:
        may_restart: Function of the exit codes of the failed ranks, and of the number of restarts that are left, which
            may be 0.
        exit_codes: Gets the exit code of each rank of this machine each time that the launcher ends them; None for a
            rank that it had to kill. Empty before ranks are started.
    """
    from torch.distributed.launcher import api

    class Agent(api.LocalElasticAgent):
        def _shutdown(self, *args: Any, **kwargs: Any) -> None:
            before = self._exit_codes()
            try:
                super()._shutdown(*args, **kwargs)
            finally:
                after = self._exit_codes()
                killed = {rank for rank in after.keys() - before.keys() if after[rank] == -signal.SIGKILL}
                exit_codes.clear()
                exit_codes.update({rank: None if rank in killed else code for rank, code in after.items()})

        def _exit_codes(self) -> dict[int, int]:
            """Return the exit codes of the ranks that have ended, by rank."""
            handlers = getattr(self._pcontext, "subprocess_handlers", {})  # no context before ranks are started
            polled = {
                worker.global_rank: handlers[worker.local_rank].proc.poll()
                for worker in self._worker_group.workers
                if worker.local_rank in handlers
            }
            return {rank: code for rank, code in polled.items() if code is not None}

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.is_failed():
                codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
                if not may_restart(codes, self._remaining_restarts):
                    self._remaining_restarts = 0
            return result

    original, api.LocalElasticAgent = api.LocalElasticAgent, Agent  # type: ignore[misc]
    try:
        yield
    finally:
        api.LocalElasticAgent = original  # type: ignore[misc]


# -- the compiler -----------------------------------------------------------------------------------------------------

#: The module of the compiler, which takes seconds to import. A server that forks workers imports it once, before it
#: forks, since constructing a ``torch.optim.Optimizer`` would import it in each worker.
COMPILER_MODULE = "torch._dynamo"

# By qualified name, so that decorating a function twice (a reloaded module) leaves one entry.
_uncompiled: dict[str, tuple[Callable[..., Any], str]] = {}
_disabled: dict[str, Callable[..., Any]] = {}


def uncompiled(reason: str) -> Callable[[F], F]:
    """Decorate a function that ``torch.compile`` must not trace; the graph breaks there with ``reason``.

    ``torch.compiler.disable`` does the same, but imports the compiler when the function is defined. Use it
    instead once that import is lazy.
    """

    def decorate(function: F) -> F:
        name = f"{function.__module__}.{function.__qualname__}"
        _uncompiled[name] = function, reason

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            called = _disabled[name] if torch.compiler.is_compiling() else function
            return called(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def prepare_compiler() -> None:
    """Import and configure the compiler; call this before the first ``torch.compile``.

    Exclude the :func:`uncompiled` functions from tracing, and enable ``nested_graph_breaks``: after a break within a
    nested call, such as a layer, tracing resumes in that call, so that the rest of the block stays in one graph.
    Remove the private setting once nested graph breaks are the default or an option of ``torch.compile``.
    """
    torch._dynamo.config.nested_graph_breaks = True
    for name, (function, reason) in _uncompiled.items():
        _disabled[name] = torch.compiler.disable(function, reason=reason)


def compile_counters() -> MutableMapping[str, Counter[str]]:
    """Return the compiler's counters: ``["stats"]["unique_graphs"]``, and ``["graph_break"]`` by reason.

    Remove this function once ``torch.compiler`` has public counters.
    """
    from torch._dynamo.utils import counters  # loads the compiler

    return counters


def compiler_failure(error: Exception) -> Exception | None:
    """Return the cause if the compiler's backend failed, such as a missing C++ compiler; None for other errors.

    Remove this function once ``torch.compiler`` has a public exception class for this failure.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # loads the compiler

    return error.inner_exception if isinstance(error, BackendCompilerFailed) else None


def adopt_sharded_parameters(module: torch.nn.Module) -> None:
    """Make a ``fully_shard`` unit use its sharded parameters after their memory was replaced; no-op for other modules.

    Uses ``FSDPModule._get_fsdp_state``, ``_fsdp_param_groups`` and ``FSDPParam.reset_sharded_param``, which torch calls
    in the first forward pass only. Remove this function once torch has a public function for this reset. Tested by
    tests/dist/test_fsdp.py, since a process group is needed.
    """
    get_state: Any = getattr(module, "_get_fsdp_state", None)
    for group in get_state()._fsdp_param_groups if get_state else ():
        for parameter in group.fsdp_params:
            parameter.reset_sharded_param()
