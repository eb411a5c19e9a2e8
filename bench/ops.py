"""Time every op against its counterpart in torch.

``python -m bench.ops [--threads 2] [--runs 15] [--only attention] [--busy 1]`` prints a table in Markdown. With
``--busy N``, N other processes keep a core busy each: no op may then take more than 1.3 times as long as torch's,
forward and backward together, since our loss makes its gradients in the forward pass.
Each line is one op at one shape in fp32: the median of runs that alternate between the two, forward, and forward and
backward together; GFLOP/s where GEMMs are the work, counted as the causal half for attention.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm import ops
from internlm.accelerator import processor
from internlm.ops import gemm, reference
from internlm.ops.cpu import kernel_choice

BUSY_TARGET = 1.3
HIDDEN, HEADS, DIM, TOKENS = 512, 8, 64, 2048
DOCUMENTS = [428, 174, 205, 357, 192, 132, 249, 311]


class Case(NamedTuple):
    """An op at a shape, and its counterpart in torch; both take ``inputs``, and GEMMs have no backward pass."""

    name: str
    shape: str
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    flops: float = 0.0  # of the forward pass; the backward pass has ``backward`` times as many
    backward: float = 2.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--busy", type=int, default=0, help="cores that other processes keep busy")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{processor.processor_name()} ({processor.processor_type()}), torch {torch.__version__}")
    print(f"{args.threads} thread(s), {args.busy} busy core(s), fp32, median of {args.runs} runs, ms (GFLOP/s)")
    print(f"kernels: {kernel_choice.summary(kernel_choice.current())}\n")
    print("| op | shape | pass | ours | torch | torch / ours |\n|---|---|---|--:|--:|--:|")
    with busy_cores(args.busy):
        ratios = {case[:2]: report(case, args.runs) for case in cases() if args.only in case.name}
    name, shape = worst = max(ratios, key=ratios.__getitem__)
    print(f"\nours / torch: at most {ratios[worst]:.2f}, {name} {shape} (to reach with a busy core: ≤ {BUSY_TARGET})")


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Let other processes compute without pause while the block runs, each bound to a core."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spin, args=(core,), daemon=True) for core in cores]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _spin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


def report(case: Case, runs: int) -> float:
    """Time one case and print its lines; return the ratio of our time to torch's, with the backward pass if any."""
    ratio = 1.0
    grad = any(x.requires_grad for x in case.inputs)
    passes = {"forward": (forward, case.flops)}
    if grad:
        passes["forward + backward"] = (forward_backward, case.flops * (1 + case.backward))
    for name, (run, flops) in passes.items():
        ours, theirs = alternate(partial(run, inputs=case.inputs), (case.ours, case.torch), runs)
        rates = [f" ({flops / seconds / 1e9:.0f})" if flops else "" for seconds in (ours, theirs)]
        times = [f"{seconds * 1e3:.2f}{rate}" for seconds, rate in zip((ours, theirs), rates, strict=True)]
        print(f"| {case.name} | {case.shape} | {name} | {times[0]} | {times[1]} | {theirs / ours:.2f} |", flush=True)
        ratio = ours / theirs
    return ratio


def alternate(run: Callable[[Any], None], functions: tuple[Any, ...], runs: int) -> list[float]:
    """Run functions in turns; return the median seconds of each, without its first two runs."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(runs + 2):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            run(function)
            times.append(time.perf_counter() - start)
    return [median(times[2:]) for times in seconds]


def forward(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Run the forward pass as in training, with gradients enabled."""
    function(*inputs)


def forward_backward(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Run forward and backward passes, with ones as the incoming gradient."""
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outs, inputs, [torch.ones(()).expand_as(x).contiguous() for x in outs])


def cases() -> Iterator[Case]:
    """Yield the cases of the table."""
    for tokens, inputs, outputs in ((2048, 512, 1536), (2048, 512, 2816), (2048, 1408, 512), (512, 512, 8192)):
        yield from gemm_cases(tokens, inputs, outputs)
    x, weight = leaf(TOKENS, HIDDEN), leaf(HIDDEN)
    yield Case(
        "rms_norm",
        f"{TOKENS}×{HIDDEN}",
        lambda x, w: ops.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        (x, weight),
    )
    yield Case("swiglu", f"{TOKENS}×2×1408", ops.gated, plain_swiglu, (leaf(TOKENS, 2, 1408),))
    table = ops.rotary_table(torch.arange(TOKENS), DIM)
    yield Case(
        "split_qkv_rotary",
        f"{TOKENS}×{HEADS}×3×{DIM}",
        lambda qkv: ops.split_qkv_rotary(qkv, *table, False),
        lambda qkv: reference.split_qkv_rotary(qkv, *table, False),
        (leaf(TOKENS, HEADS, 3, DIM),),
    )
    for groups in (8, 2):
        for lengths in ([64] * 32, DOCUMENTS, [512] * 4, [2048]):
            yield attention_case(lengths, groups)
    for vocab in (8192, 32000):
        yield from cross_entropy_cases(vocab)


def gemm_cases(tokens: int, inputs: int, outputs: int) -> Iterator[Case]:
    """Yield the three products of a linear layer."""
    x, weight, dy = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    out, flops = torch.zeros(outputs, inputs), 2.0 * tokens * inputs * outputs
    shape = f"{tokens}×{inputs}→{outputs}"
    yield Case("linear", shape, gemm.linear, F.linear, (x, weight), flops)
    yield Case("grad_input", shape, gemm.grad_input, torch.mm, (dy, weight), flops)
    yield Case(
        "accumulate_grad_weight",
        shape,
        gemm.accumulate_grad_weight,
        lambda out, dy, x: out.addmm_(dy.t(), x),
        (out, dy, x),
        flops,
    )


def attention_case(lengths: list[int], groups: int) -> Case:
    """Make a case of attention over packed sequences; sdpa takes a call for every run of equal lengths."""
    sequences = ops.PackedSequences.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))
    tokens, pairs = sum(lengths), sum(length * (length + 1) / 2 for length in lengths)
    equal = len(set(lengths)) == 1
    return Case(
        "attention",
        f"{len(lengths)}×{lengths[0] if equal else 'documents'}, {HEADS} heads, {groups} kv",
        lambda q, k, v: ops.attention(q, k, v, sequences),
        lambda q, k, v: ops.attention(q, k, v, sequences, backend="sdpa"),
        tuple(leaf(n, tokens, DIM).detach().transpose(0, 1).requires_grad_() for n in (HEADS, groups, groups)),
        4 * pairs * HEADS * DIM,
        2.5,
    )


def cross_entropy_cases(vocab: int) -> Iterator[Case]:
    """Yield the output projection with its loss, against plain torch and against torch's chunked op."""
    labels = torch.randint(0, vocab, (TOKENS,))
    inputs = leaf(TOKENS, HIDDEN), (torch.randn(vocab, HIDDEN) / HIDDEN**0.5).requires_grad_()
    counterparts: dict[str, Callable[..., Any]] = {
        "F.cross_entropy": lambda x, w: F.cross_entropy(F.linear(x, w), labels, reduction="sum")
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        counterparts["F.linear_cross_entropy"] = lambda x, w: F.linear_cross_entropy(
            x, w, labels, reduction="sum", options=options
        )
    for name, counterpart in counterparts.items():
        yield Case(
            "linear_cross_entropy",
            f"{TOKENS}×{HIDDEN}→{vocab}, {name}",
            lambda x, w: ops.linear_cross_entropy(x, w, labels).loss_sum,
            counterpart,
            inputs,
            2.0 * TOKENS * HIDDEN * vocab,
        )


def plain_swiglu(gate_up: Tensor) -> Tensor:
    """Compute SwiGLU by the formula."""
    gate, up = gate_up.unbind(1)
    return F.silu(gate) * up


def leaf(*shape: int) -> Tensor:
    """Draw normal numbers that require a gradient."""
    return torch.randn(*shape).requires_grad_()


if __name__ == "__main__":
    main()
