"""Full sharding of parameters and gradients (ZeRO stage 3) with PyTorch's ``fully_shard``.

See Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3. A *unit* is a declared block of the model; everything
outside of blocks is one more unit, the root. Each of n ranks holds ⌈rows / n⌉ consecutive rows of every parameter; the
last ranks may hold fewer or none.

1. Before the forward pass of a unit, its parameters are all-gathered; after the forward pass, they are freed.
2. Before the backward pass of the unit, its parameters are all-gathered again.
3. After the backward pass, its gradients are reduce-scattered, and each rank adds the result to the gradient of its
   shard. This happens in every micro-batch, so that unsharded gradients exist for only one unit at a time.

The root is an exception: its parameters stay gathered between forward and backward.

If the compute dtype is float16 or bfloat16, parameters are stored in float32 and rounded before the all-gather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from internlm.accelerator import device_type, with_values
from internlm.core.context.group import Group
from internlm.core.parallel.blocks import containing_block, declared_blocks
from internlm.core.parallel.ledger import LEDGER, Collective
from internlm.core.parallel.linear import ParallelLinear
from internlm.core.parallel.param_state import placed_parameters, set_compute_dtype, set_placement
from internlm.utils.dtype import wide
from internlm.utils.errors import ConfigError, Problem
from internlm.utils.torch_private import adopt_sharded_parameters


def shard_fully(
    model: nn.Module,
    group: Group,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Shard the parameters and gradients of ``model`` over ``group`` with ``fully_shard``, in place.

    Args:
        model: Model whose parameters all have the dtype ``dtype``.
        group: Group of at least two ranks to shard over.
        dtype: Compute dtype.
        grad_dtype: Dtype of the gradients of one micro-batch. None: ``dtype``.
        reduce_dtype: Dtype in which gradients are reduce-scattered. None: ``grad_dtype``.

    Raises:
        ConfigError: A parameter has a dtype other than ``dtype``, is a scalar, or belongs to several units.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it imports the compiler, 1 s

    placements = {name: placement for name, _, placement in placed_parameters(model)}
    grad_dtype = grad_dtype or dtype
    if problem := _unshardable(model, dtype):
        todo = "Change the parameter, or set parallel.zero1.fsdp=False"
        raise ConfigError(Problem("parallel.zero1.fsdp", f"True, but parameter {problem}", todo))
    _make_matrices(model)
    assert group.handle is not None, "fully_shard needs a process group"
    with with_values():
        mesh = DeviceMesh.from_group(group.handle, device_type())  # parameters may be on the meta device
    policy = MixedPrecisionPolicy(dtype, grad_dtype, cast_forward_inputs=False)
    for unit in (*declared_blocks(model).values(), model):
        for parameter in _unsharded(unit):
            parameter.data = parameter.data.to(wide(dtype))  # main parameters; the policy rounds them to dtype
        _configure(fully_shard(unit, mesh=mesh, mp_policy=policy), group, grad_dtype, reduce_dtype or grad_dtype)
    model.register_forward_hook(_reshard_root)
    _keep_host_inputs(model)
    for name, parameter in model.named_parameters():
        set_placement(parameter, placements[name])  # fully_shard has created new parameters
        set_compute_dtype(parameter, dtype)


def adopt_new_shards(model: nn.Module) -> None:
    """Make ``fully_shard`` use new local shards after parameters were replaced, and pad the shards to equal size.

    ``fully_shard`` itself does so only in the first forward pass, by which time the optimizer already refers to the
    shards.
    """
    for module in model.modules():
        adopt_sharded_parameters(module)


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether :func:`shard_fully` has been applied to ``model``."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


class LocalShard(NamedTuple):
    """Flat view of this rank's elements of a parameter, with the index of the first element.

    The index, ``start``, counts from the beginning of the flattened shard that the parameter's placement describes.
    ``fully_shard`` splits this shard over ranks.
    """

    flat: Tensor
    start: int


def local_shard(parameter: Tensor) -> LocalShard:
    """Return a flat view of this rank's elements of ``parameter``: all, unless ``parameter`` is fully sharded."""
    parameter = parameter.detach()
    if not isinstance(parameter, DTensor):
        return LocalShard(parameter.view(-1), 0)
    rows, mesh = parameter.shape[0], parameter.device_mesh
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return LocalShard(parameter.to_local().view(-1), first * math.prod(parameter.shape[1:]))


def set_grad(parameter: Tensor, flat: Tensor) -> None:
    """Set the gradient of a fully sharded ``parameter`` to a DTensor view of ``flat``, its flat local gradient."""
    like = parameter.detach()
    assert isinstance(like, DTensor)
    mesh, local = like.device_mesh, flat.view_as(like.to_local())
    parameter.grad = DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@dataclass(frozen=True)
class _HostInput:
    """Input that stays on the host."""

    tensor: Tensor


def _keep_host_inputs(model: nn.Module) -> None:
    """Keep the inputs that the model reads on the host there: ``fully_shard`` copies all tensors to the device."""
    names = getattr(model, "host_inputs", ())

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = {name: _HostInput(kwargs[name]) for name in names if kwargs.get(name) is not None}
        return args, {**kwargs, **hidden}

    def show(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {key: value.tensor if isinstance(value, _HostInput) else value for key, value in kwargs.items()}

    model.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)  # before the hook of fully_shard
    model.register_forward_pre_hook(show, with_kwargs=True)  # after it


def _unshardable(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Return why a parameter of ``model`` cannot be fully sharded, or None if every parameter can be."""
    blocks = declared_blocks(model)
    first: dict[nn.Parameter, tuple[str, str]] = {}  # unit and name of its first occurrence
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            block = containing_block(path, blocks)
            name, unit = f"{path}.{own}".lstrip("."), block if block in blocks else ""
            if parameter.dtype != dtype:
                return f"{name!r} has dtype {parameter.dtype}, expected {dtype}"
            if parameter.dim() == 0:
                return f"{name!r} is a scalar, expected at least 1 dimension"
            elsewhere, alias = first.setdefault(parameter, (unit, name))
            if elsewhere != unit:
                return f"{name!r} is tied to {alias!r}, which is not in the same block"
    return None


def _make_matrices(model: nn.Module) -> None:
    """Flatten the weights of linears to matrices and their biases to vectors."""
    # fully_shard splits the first axis, and natural axes such as (2, intermediate, hidden) begin with a short one.
    for linear in model.modules():
        if isinstance(linear, ParallelLinear):
            if linear.weight.dim() > 2:
                linear.weight = nn.Parameter(linear.weight.detach().flatten(0, -2), linear.weight.requires_grad)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach().flatten(), linear.bias.requires_grad)


def _unsharded(unit: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of ``unit`` that are plain tensors: not yet sharded, or currently gathered."""
    return [parameter for parameter in unit.parameters() if not isinstance(parameter, DTensor)]


def _configure(unit: Any, group: Group, grad_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Configure ``unit`` to sum gradients rather than average them, and to count its collectives in the ledger."""
    # Sums, not means: the loss is already divided by the valid tokens of the global batch.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    unit.set_custom_all_gather(_AllGather(group))
    unit.set_custom_reduce_scatter(_ReduceScatter(group, reduce_dtype))
    unit.register_forward_pre_hook(partial(_widen_gradients, grad_dtype))


def _widen_gradients(grad_dtype: torch.dtype, unit: nn.Module, _: Any) -> None:
    """Set the dtype in which autograd accumulates gradients of the parameters that were just gathered."""
    for parameter in _unsharded(unit):
        if parameter.requires_grad and parameter.grad_dtype != grad_dtype:
            parameter.grad_dtype = grad_dtype


def _reshard_root(root: Any, *_: Any) -> None:
    """Free the gathered parameters of the root after a forward pass that no backward pass follows."""
    if not torch.is_grad_enabled():
        root.reshard()


class _Counted:
    """Base class of collectives for ``fully_shard`` that are counted in the ledger."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _count(self, name: Collective, shard: Tensor, sent: Tensor) -> None:
        LEDGER.record(self.group.mode, name, (self.group.size - 1) * shard.nbytes, sent)


class _AllGather(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._count("all-gather", input_tensor, input_tensor)
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Counted):
    """Reduce-scatter of gradients in ``dtype``.

    ``MixedPrecisionPolicy.reduce_dtype`` is not used, since it has no effect if it equals the dtype of the parameters.
    """

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        super().__init__(group)
        self.dtype = dtype

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        sent = input_tensor.to(self.dtype)
        shard = output_tensor if sent is input_tensor else torch.empty_like(output_tensor, dtype=self.dtype)
        self._count("reduce-scatter", shard, sent)
        work = dist.reduce_scatter_single(shard, sent, op=op, group=group, async_op=async_op)
        if shard is not output_tensor:
            if work is not None:
                work.wait()  # the conversion below reads the result, so nothing is left to overlap
            output_tensor.copy_(shard)
        return work
