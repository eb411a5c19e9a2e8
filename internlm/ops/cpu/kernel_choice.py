"""Choice of CPU kernels: one table by operation, dtype, size and number of threads.

No kernel is the fastest on all processors. MKL, behind ``torch.mm``, uses AVX-512 on Intel processors and not on
others; oneDNN uses it on both, but copies a factor of each weight gradient. So a table chooses the kernel of each
:class:`Case`. Its sources, the first that applies:

1. the user's, in the variable ``INTERNLM_CPU_KERNELS``,
2. a checkpoint of a run on the same type of processor (:mod:`internlm.ops.cpu.kernel_start`),
3. a measurement at the start of a run, kept in a cache file,
4. :func:`rule`, by the type of processor. It serves code that uses the ops without starting a run.

The choice never depends on the load of the machine during a step, so a run can be repeated bit by bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch

from internlm.accelerator import processor
from internlm.utils.errors import ConfigError, Problem

#: Kernels by operation and dtype of the factors. ``grad_weight`` of bfloat16 factors is the one that adds to a float32
#: gradient; its kernels are named after the type in which they multiply.
KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("linear", "float32"): ("onednn", "torch"),
    ("grad_input", "float32"): ("onednn", "torch"),
    ("grad_weight", "float32"): ("onednn", "torch"),
    ("grad_weight", "bfloat16"): ("float32", "bfloat16"),
    ("attention", "float32"): ("blocked", "sdpa"),
}
#: Work from which a case is large: multiply-adds of a GEMM, tokens of the longest sequence. Smaller cases take little
#: of a step, so they are not measured, and their kernels are the same on all processors.
LARGE = {"linear": 2**25, "grad_input": 2**25, "grad_weight": 2**25, "attention": 256}
#: Kernels that run hundreds of short parallel regions. With several threads, if another process keeps one of the cores
#: busy, each region waits for a thread to get its turn, and the whole takes ten times as long. So nothing but the
#: user's own choice selects them for several threads, however fast they are on an idle machine.
COLLAPSING = frozenset({("attention", "blocked")})
#: Short names in ``INTERNLM_CPU_KERNELS`` for several operations.
_GROUPS = {"gemm": ("linear", "grad_input", "grad_weight")}
MEASURE, RULE = "measure", "rule"


class Case(NamedTuple):
    """Key of the table: what is computed, at which size, and whether by several threads."""

    operation: str
    dtype: str
    large: bool
    threaded: bool

    def __str__(self) -> str:
        size, threads = "large" if self.large else "small", "several threads" if self.threaded else "one thread"
        return f"{self.operation} {self.dtype} {size}, {threads}"


Table: TypeAlias = Mapping[Case, str]

CASES = [Case(*key, *rest) for key in KERNELS for rest in itertools.product((False, True), repeat=2)]

_installed: dict[Case, str] | None = None


def kernel_for(operation: str, dtype: str, work: int) -> str:
    """Return the name of the kernel for an operation.

    Args:
        operation: Operation, such as ``"grad_weight"``.
        dtype: Dtype of the factors, such as ``"float32"``.
        work: Multiply-adds of a GEMM, or tokens of the longest sequence of attention.
    """
    table = current()
    return table[Case(operation, dtype, work >= LARGE[operation], torch.get_num_threads() > 1)]


def current() -> dict[Case, str]:
    """Return the installed table; install the rule with the user's choice if there is none."""
    global _installed
    if _installed is None:
        _installed = {**rule(processor.processor_type()), **forced(processor.requested_kernels())}
    return _installed


def install(table: Table | None) -> None:
    """Use ``table`` for all operations from now on; None: the rule with the user's choice."""
    global _installed
    _installed = None if table is None else dict(table)


def rule(processor_type: str) -> Table:
    """Choose kernels by the type of processor alone."""
    return {case: _rule(case, processor_type) for case in CASES}


def _rule(case: Case, processor_type: str) -> str:
    default, other = KERNELS[case.operation, case.dtype]
    words = processor_type.split()
    if case.operation == "attention":
        # Of short sequences the blocks are too small to pay.
        return other if may_collapse(case) or not case.large or _mkl_is_wide(words) else default
    if not case.large:
        return default
    if case.dtype == "bfloat16":
        return other if processor.has_bf16(processor_type) else default
    return other if _mkl_is_wide(words) else default


def may_collapse(case: Case) -> bool:
    """Return whether a kernel of this case is much slower on a busy machine."""
    return case.threaded and any((case.operation, kernel) in COLLAPSING for kernel in _kernels_of(case))


def collapses(table: Table) -> bool:
    """Return whether ``table`` selects a kernel that is much slower on a busy machine."""
    return any(case.threaded and (case.operation, kernel) in COLLAPSING for case, kernel in table.items())


def _mkl_is_wide(words: Iterable[str]) -> bool:
    return {"GenuineIntel", "avx512f"} <= set(words)


# -- the user's choice ------------------------------------------------------------------------------------------------
def forced(value: str) -> Table:
    """Parse ``"operation=kernel,…"``, the user's choice; ``"measure"``, ``"rule"`` and ``""`` force nothing.

    A choice holds for all sizes and numbers of threads. ``gemm`` stands for ``linear``, ``grad_input`` and
    ``grad_weight``.

    Raises:
        ConfigError: An operation or a kernel is unknown.
    """
    if value in ("", MEASURE, RULE):
        return {}
    table: dict[Case, str] = {}
    for entry in value.split(","):
        name, _, kernel = (text.strip() for text in entry.partition("="))
        found = [case for case in CASES if case.operation in _GROUPS.get(name, (name,)) and kernel in _kernels_of(case)]
        if not found:
            known = "; ".join(f"{operation}={'|'.join(names)}" for (operation, _), names in KERNELS.items())
            message = f"{entry!r} names no operation and kernel"
            raise ConfigError(Problem(processor.KERNELS_VARIABLE, message, f"Known: measure; rule; {known}"))
        table |= dict.fromkeys(found, kernel)
    return table


def _kernels_of(case: Case) -> tuple[str, ...]:
    return KERNELS[case.operation, case.dtype]


# -- plain data -------------------------------------------------------------------------------------------------------
def to_plain(table: Table) -> dict[str, str]:
    """Convert a table to a JSON-serialisable dict."""
    return {str(case): kernel for case, kernel in table.items()}


def from_plain(plain: object) -> Table | None:
    """Convert the result of :func:`to_plain` back to a table; None if a case is missing or a kernel unknown."""
    if not isinstance(plain, dict):
        return None
    table: dict[Case, str] = {case: plain.get(str(case), "") for case in CASES}
    return table if all(kernel in _kernels_of(case) for case, kernel in table.items()) else None


def summary(table: Table) -> str:
    """Summarise the kernels of large cases on the current number of threads: ``"linear onednn, attention sdpa"``."""
    threaded = torch.get_num_threads() > 1
    return ", ".join(
        f"{case.operation}{'' if case.dtype == 'float32' else f' of {case.dtype}'} {kernel}"
        for case, kernel in table.items()
        if case.large and case.threaded == threaded
    )
