"""Count kernels launched and bytes moved, by our model and by a plain one of the same sizes: ``python -m bench.count``.

Both run on meta tensors, for which the code takes the path of an accelerator, so neither a GPU nor memory is needed. A
dispatch mode below autograd sees every operator that runs, those in the backward pass and in autograd functions
included. It cannot look into an operator of another library than ATen, so each of those must be in :data:`FUSED`, with
the kernels that it launches on a GPU; any other raises. Fused attention and normalisation, which torch decomposes on
meta tensors, are recorded as the kernels that they launch on a GPU, equally for both sides.

An operator that is not a view counts as one launch, and moves the bytes of each tensor that it reads and writes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.block_peer import PlainBlock, PlainModel
from bench.yardsticks import LLAMA_30M
from internlm import ops
from internlm.accelerator.kinds import DeviceKind, pretending
from internlm.config.schema import AdamConfig, HybridZeroConfig, ModelConfig
from internlm.core.parallel.param_state import attach_main_grad, mark_stale
from internlm.model.blocks import Block
from internlm.model.decoder import Decoder
from internlm.model.families import FAMILIES, spec_of
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.utils.dtype import default_dtype

#: Kernels that a fused operator launches on a GPU. The backward pass of FlashAttention has one kernel before its main
#: one and one after it; that of the norm has one for dx and one for the weight.
FUSED = {
    "attention": 1,
    "attention backward": 3,
    "_varlen_attn": 1,
    "_varlen_attn_backward": 3,
    "rms_norm": 1,
    "rms_norm backward": 2,
}
#: Operators that launch nothing, beside views: allocations and questions about a tensor.
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "_unsafe_view", "promote_types")
#: Operators that read none of their arguments, by the start of their names.
_FILLS = ("zeros", "ones", "full", "new_zeros", "new_full", "zero_", "fill_", "scalar_tensor")
#: Positions of arguments that an operator does not read.
_UNREAD = {"copy_": (0,), "_foreach_copy_": (0,), "nll_loss_backward": (1,)}
#: Positions of arguments that an operator without a result writes; default: the first.
_WRITTEN = {"_fused_adamw_": (0, 2, 3)}
#: Operators that read or write only as many elements of their first argument as they select.
_INDEXED = ("gather", "embedding", "index_select", "nll_loss_forward", "scatter_add_")

#: Sizes by name: section ``model``, sequences and their length.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "bench-30M": (dict(vocab_size=8192), 4, 512),
    "8B": (
        dict(
            num_layers=2,
            hidden_size=4096,
            num_attention_heads=32,
            num_kv_attention_heads=8,
            mlp_ratio=14336 / 4096,
            vocab_size=128256,
        ),
        1,
        8192,
    ),
}


class _Happened:
    def synchronize(self) -> None:
        """Return at once."""


class MetaKind(DeviceKind):
    """Kind of meta tensors: like an accelerator, but without values to copy."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Return the host tensor as it is."""
        return tensor

    def begin_copy(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Return zeros instead of the values, and an event that has happened."""
        return torch.zeros(tensor.shape, dtype=tensor.dtype), _Happened()


META = torch.device("meta")


class Cost(NamedTuple):
    """Kernels launched and bytes moved."""

    kernels: int
    bytes: int


class Launches(TorchDispatchMode):
    """Record the operators that run, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @property
    def cost(self) -> Cost:
        """Sums so far."""
        return Cost(self.kernels.total(), self.bytes.total())

    def record(self, name: str, *tensors: Tensor, kernels: int = 1) -> None:
        """Record kernels that read or write each of ``tensors`` once."""
        self.kernels[name] += kernels
        self.bytes[name] += sum(map(_bytes, tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace not in ("aten", "prim", "profiler") and func._opname not in FUSED:
            raise NotImplementedError(f"{func} is no operator of ATen. Record its kernels in bench.count.FUSED")
        if func.namespace in ("prim", "profiler") or func.is_view or func._opname in _FREE:
            return out
        name, tensors = func._opname, _tensors((args, kwargs))
        if not any(x.is_meta for x in (*tensors, *_tensors(out))):
            return out  # on the host
        # What an operator in place or into ``out`` writes is among its arguments.
        outs = _tensors([x for key, x in kwargs.items() if key.startswith("out") and x is not (args or [0])[0]])
        written = _tensors(out) or _tensors([args[i] for i in _WRITTEN.get(name, (0,))])
        if name == "_fused_adamw_" and kwargs.get("grad_scale") is not None:
            written += _tensors(args[1])  # it stores the gradients that it has divided
        unread = [*outs, *_tensors([args[i] for i in _UNREAD.get(name, ())])]
        if kwargs.get("beta") == 0:  # then addmm overwrites its first argument
            unread += args[:1]
        # An argument that is also the output, or is given twice, is read once.
        distinct = {id(x): x for x in tensors}.values()
        read = [] if name.startswith(_FILLS) else [x for x in distinct if not any(x is y for y in unread)]
        if name in _INDEXED:  # only the selected elements of a tensor are read or written
            read, written = [x for x in read if x is not args[0]], [read[-1] if name == "scatter_add_" else written[0]]
            read.append(written[0])
        self.record(name, *read, *written, kernels=FUSED.get(name, 1))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """Return the bytes of the distinct elements of ``x``: a dimension of stride 0 is read once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


@contextmanager
def fused_operators(launches: Launches) -> Iterator[None]:
    """Record attention and rms_norm as fused kernels while the block runs."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
            launches.record("attention", q, k, v, out, lse, kernels=FUSED["attention"])
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
            saved = ctx.saved_tensors
            grads = tuple(torch.empty_like(x) for x in saved[:3])
            launches.record("attention backward", dout, *saved, *grads, kernels=FUSED["attention backward"])
            return grads

    class RMSNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
            launches.record("rms_norm", x, weight, out, rstd, kernels=FUSED["rms_norm"])
            ctx.save_for_backward(x, weight, rstd)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
            x, weight, rstd = ctx.saved_tensors
            grads = torch.empty_like(x), torch.empty_like(weight)
            launches.record("rms_norm backward", dout, x, weight, rstd, *grads, kernels=FUSED["rms_norm backward"])
            return grads

    before = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)  # type: ignore[assignment]
    F.rms_norm = lambda x, shape, weight, eps: RMSNorm.apply(x, weight)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = before


def count(run: Callable[[], object]) -> Launches:
    """Run a function on meta tensors and return what it launched."""
    launches = Launches()
    with fused_operators(launches), launches:
        run()
    return launches


def our_block(model: ModelConfig, sequences: int, length: int) -> Callable[[], object]:
    """Return forward and backward pass of our block, which writes weight gradients in float32."""
    with META:
        block = Block(spec_of(FAMILIES["LLAMA2"], model), 0)
    for parameter in block.parameters():
        attach_main_grad(parameter, torch.empty_like(parameter, dtype=torch.float32))
    tokens = sequences * length
    packed = ops.PackedSequences.uniform(sequences, length, "meta")
    rotary = ops.rotary_table(torch.empty(tokens, device=META), model.head_size)
    x, dout = (torch.empty(tokens, model.hidden_size, device=META) for _ in range(2))
    x.requires_grad_()

    def step() -> None:
        mark_stale(block.parameters())  # as at the start of a step
        block(x, rotary, packed).backward(dout)

    return step


def plain_block(model: ModelConfig, sequences: int, length: int) -> Callable[[], object]:
    """Return forward and backward pass of the plain block; in bfloat16, conversions belong to the step."""
    with META:
        block = PlainBlock(model)
    rotations = torch.empty(length, model.head_size // 2, dtype=torch.complex64, device=META)
    x, dout = (torch.empty(sequences, length, model.hidden_size, device=META) for _ in range(2))
    x.requires_grad_()
    return lambda: block(x, rotations).backward(dout)


def our_step(model: ModelConfig, sequences: int, length: int) -> Callable[[], object]:
    """Return a step of our model and optimizer, with clipping."""
    with META:
        decoder = Decoder(spec_of(FAMILIES["LLAMA2"], model))
    optimizer = HybridZeroOptimizer(decoder, AdamConfig(lr=1e-4), HybridZeroConfig(clip_grad_norm=1.0))
    ids = torch.empty(sequences, length, dtype=torch.int64, device=META)

    def step() -> None:
        optimizer.begin_step(1)
        decoder(ids, labels=ids, grad_scale=1.0 / ids.numel()).loss_sum.backward()
        optimizer.step(1e-4, 0.95)

    return step


def plain_step(model: ModelConfig, sequences: int, length: int) -> Callable[[], object]:
    """Return a step of the plain model: clipping and fused AdamW on float32 parameters, one kernel over all of them.

    In bfloat16 it has the mixed precision of torch's ``fully_shard`` with its defaults, as on one rank: parameters are
    float32, and each unit is converted when it is gathered, blocks for the forward and again for the backward pass, the
    rest once; gradients are converted to float32 to be reduced. One kernel converts all of a unit. Collectives, and
    copies to and from their buffers, are not counted.
    """
    with META:
        plain = PlainModel(model)
    held = list(plain.parameters())
    is_wide = held[0].dtype == torch.float32
    main, sums, squares = ([torch.empty_like(x, dtype=torch.float32) for x in held] for _ in range(3))
    counts = [torch.empty((), dtype=torch.float32, device=META) for _ in held]
    ids = torch.empty(sequences, length, dtype=torch.int64, device=META)
    rotations = torch.empty(length, model.head_size // 2, dtype=torch.complex64, device=META)
    blocks = [list(block.parameters()) for block in plain.blocks]
    rest = [x for module in (plain.embedding, plain.norm, plain.output) for x in module.parameters()]

    @torch.no_grad()
    def convert(unit: list[nn.Parameter]) -> None:
        if not is_wide:
            torch._foreach_copy_(unit, [torch.empty_like(x, dtype=torch.float32) for x in unit])

    @torch.no_grad()
    def reduced(unit: list[nn.Parameter]) -> list[Tensor]:
        grads = [x.grad for x in unit if x.grad is not None]
        if is_wide:
            return grads
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        torch._foreach_copy_(wide, grads)
        return wide

    @torch.no_grad()
    def update(grads: list[Tensor]) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        rates = dict(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)
        torch._fused_adamw_(main, grads, sums, squares, [], counts, **rates)

    def step() -> None:
        for unit in (rest, *blocks, *blocks):
            convert(unit)
        plain(ids, ids, rotations).backward()
        update([grad for unit in (rest, *blocks) for grad in reduced(unit)])
        plain.zero_grad()

    return step


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--operators", action="store_true", help="also print each operator's kernels and bytes")
    args = parser.parse_args()
    print(
        "| sizes | part | kernels, ours | plain | ratio | MB, ours | plain | ratio |\n|---|---|--:|--:|--:|--:|--:|--:|"
    )
    details: list[str] = []
    for (name, part), (ours, plain) in counts(getattr(torch, args.dtype)):
        kernels, moved = (ours.cost[i] / plain.cost[i] for i in range(2))
        megabytes = [side.cost.bytes / 1e6 for side in (ours, plain)]
        print(
            f"| {name} | {part} | {ours.cost.kernels} | {plain.cost.kernels} | {kernels:.2f} "
            f"| {megabytes[0]:.0f} | {megabytes[1]:.0f} | {moved:.2f} |"
        )
        details += [f"\n{name}, {part}", *_by_operator(ours, plain)]
    if args.operators:
        print("\n".join(details))


def counts(dtype: torch.dtype) -> Iterator[tuple[tuple[str, str], list[Launches]]]:
    """Yield what ours and the plain side launch, for each size and for a layer and a step."""
    for name, (keys, sequences, length) in SIZES.items():
        model = ModelConfig(**{**LLAMA_30M, **keys, "dtype": str(dtype)})
        for part, sides in {"layer": (our_block, plain_block), "step": (our_step, plain_step)}.items():
            with pretending(MetaKind(name=META.type, backend="")), default_dtype(dtype):
                yield (name, part), [count(side(model, sequences, length)) for side in sides]


def _by_operator(ours: Launches, plain: Launches) -> Iterator[str]:
    for name in sorted(ours.kernels | plain.kernels, key=lambda name: -max(ours.bytes[name], plain.bytes[name])):
        sides = "  ".join(f"{side.kernels[name]:5} {side.bytes[name] / 1e6:9.1f} MB" for side in (ours, plain))
        yield f"  {name:32} {sides}"


if __name__ == "__main__":
    main()
