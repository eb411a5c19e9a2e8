"""Parameters and gradients that the ranks of a group share, by PyTorch's ``fully_shard``: stage 3 of ZeRO (Rajbhandari
et al. 2020, arXiv 1910.02054, section 5.3).

A *unit* is a block of the model; what lies outside of blocks is one more, the root. Of n ranks each holds a run of rows
of every parameter, ⌈rows/n⌉ of them, the last ranks fewer or none.

1. Before a unit runs forward its parameters are gathered, and after it given up.
2. Before it runs backward they are gathered once more. Those of the root stay in between.
3. After it ran backward its gradients are summed over the group, and each rank adds its part to what it has: in every
   micro-batch, so that gradients are whole for one unit at a time.

Parameters that are computed with in half precision are kept in float32, and rounded as they are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from internlm.accelerator import device_type
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
    """Share the parameters of ``model``, computed with in ``dtype``, over ``group``. Gradients of micro-batches are of
    ``grad_dtype`` (default: ``dtype``), and summed over the group in ``reduce_dtype`` (default: ``grad_dtype``).

    Raises :class:`ConfigError` where a parameter is of another type, a scalar, or in several units.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # which imports the compiler

    placements = {name: placement for name, _, placement in placed_parameters(model)}
    grad_dtype = grad_dtype or dtype
    if problem := _unfit(model, dtype):
        raise ConfigError(Problem("parallel.zero1.fsdp", f"True, but {problem}", "Set it to False"))
    _make_matrices(model)
    assert group.handle is not None, "a rank that is alone has nobody to share with"
    mesh = DeviceMesh.from_group(group.handle, device_type())  # not a parameter's, which may be on the meta device
    policy = MixedPrecisionPolicy(dtype, grad_dtype, cast_forward_inputs=False)
    for unit in (*declared_blocks(model).values(), model):
        for parameter in _whole(unit):
            parameter.data = parameter.data.to(wide(dtype))
        _set_up(fully_shard(unit, mesh=mesh, mp_policy=policy), group, grad_dtype, reduce_dtype or grad_dtype)
    model.register_forward_hook(_give_up_root)
    for name, parameter in model.named_parameters():
        set_placement(parameter, placements[name])  # fully_shard has made new parameters
        set_compute_dtype(parameter, dtype)


def adopt_new_shards(model: nn.Module) -> None:
    """Have ``fully_shard`` take over local shards that were replaced since, and pad those that are short.

    It would do so in its first forward pass, too late for an optimizer that refers to the memory of the shards.
    """
    for module in model.modules():
        adopt_sharded_parameters(module)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether that was done to ``model``."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


class LocalShard(NamedTuple):
    """The elements of a parameter's flattened part, as its placement knows it, that are held here: those of ``flat``,
    the first of which is number ``start``."""

    flat: Tensor
    start: int


def local_shard(parameter: Tensor) -> LocalShard:
    """What this rank holds of ``parameter``, in its own memory; all of it, unless that is shared."""
    parameter = parameter.detach()
    if not isinstance(parameter, DTensor):
        return LocalShard(parameter.view(-1), 0)
    rows, mesh = parameter.shape[0], parameter.device_mesh
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return LocalShard(parameter.to_local().view(-1), first * math.prod(parameter.shape[1:]))


def set_grad(parameter: Tensor, flat: Tensor) -> None:
    """Have the gradient of what is held here of ``parameter`` added to ``flat``."""
    like = parameter.detach()
    assert isinstance(like, DTensor)
    mesh, local = like.device_mesh, flat.view_as(like.to_local())
    parameter.grad = DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _unfit(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a parameter of ``model`` can't be shared, if one can't."""
    blocks = declared_blocks(model)
    first: dict[nn.Parameter, tuple[str, str]] = {}  # the unit and the name under which it comes first
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            block = containing_block(path, blocks)
            name, unit = f"{path}.{own}".lstrip("."), block if block in blocks else ""
            if parameter.dtype != dtype:
                return f"{name!r} is of {parameter.dtype}, and all else of {dtype}"
            if parameter.dim() == 0:
                return f"{name!r} is a scalar, of which nothing can be shared (shape [1] can)"
            elsewhere, alias = first.setdefault(parameter, (unit, name))
            if elsewhere != unit:
                return f"{name!r} is also {alias!r}, which is gathered at another time"
    return None


def _make_matrices(model: nn.Module) -> None:
    """Give linears their weights as matrices and their biases as vectors: of natural axes the first may be short, and
    it is the one that is split."""
    for linear in model.modules():
        if isinstance(linear, ParallelLinear):
            if linear.weight.dim() > 2:
                linear.weight = nn.Parameter(linear.weight.detach().flatten(0, -2), linear.weight.requires_grad)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach().flatten(), linear.bias.requires_grad)


def _whole(unit: nn.Module) -> list[nn.Parameter]:
    """The parameters of a unit that are not shared, or gathered at present."""
    return [parameter for parameter in unit.parameters() if not isinstance(parameter, DTensor)]


def _set_up(unit: Any, group: Group, grad_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Sums rather than means, and collectives that are counted."""
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    unit.set_custom_all_gather(_AllGather(group))
    unit.set_custom_reduce_scatter(_ReduceScatter(group, reduce_dtype))
    unit.register_forward_pre_hook(partial(_widen_gradients, grad_dtype))


def _widen_gradients(grad_dtype: torch.dtype, unit: nn.Module, _: Any) -> None:
    """Let gradients of the parameters that were just gathered be of ``grad_dtype``."""
    for parameter in _whole(unit):
        if parameter.requires_grad and parameter.grad_dtype != grad_dtype:
            parameter.grad_dtype = grad_dtype


def _give_up_root(root: Any, *_: Any) -> None:
    """Where no backward pass follows that would do it."""
    if not torch.is_grad_enabled():
        root.reshard()


class _Counted:
    """A collective over the group, as ``fully_shard`` takes it."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _count(self, name: Collective, shard: Tensor) -> None:
        LEDGER.record(self.group.mode, name, (self.group.size - 1) * shard.nbytes)


class _AllGather(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._count("all-gather", input_tensor)
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Counted):
    """In ``dtype``: a policy's own type of reduction counts for nothing where it is that of the parameters."""

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
        part = output_tensor if sent is input_tensor else torch.empty_like(output_tensor, dtype=self.dtype)
        self._count("reduce-scatter", part)
        work = dist.reduce_scatter_single(part, sent, op=op, group=group, async_op=async_op)
        if part is not output_tensor:
            if work is not None:
                work.wait()
            output_tensor.copy_(part)
        return work
