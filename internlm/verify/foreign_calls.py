"""Collectives that a user's model calls through ``torch.distributed``, which the communication ledger does not see."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.ledger import Collective

#: Collectives by function of ``torch.distributed``, with the position of the tensor that a rank passes in.
FUNCTIONS: dict[str, tuple[Collective, int]] = {
    "all_reduce": ("all-reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "all_gather": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 1),
    "all_gather_single": ("all-gather", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "all_to_all_single": ("all-to-all", 1),
}
#: Modes whose name is given to a group of the same ranks, the first that fits.
MODES = (
    ParallelMode.TENSOR,
    ParallelMode.DATA,
    ParallelMode.WEIGHT,
    ParallelMode.PIPELINE,
    ParallelMode.ZERO1,
    ParallelMode.GLOBAL,
)


Observe = Callable[[str, Collective, Tensor], None]


@contextmanager
def observing(observe: Observe) -> Iterator[None]:
    """Call ``observe(mode, collective, tensor)`` before each collective that other code calls in the ``with`` block.

    Calls of this package are left out: they are in the ledger, by the names of what they do, such as a reduce-scatter
    that is an all-to-all on gloo.
    """
    originals = {name: getattr(dist, name) for name in FUNCTIONS if hasattr(dist, name)}
    for name, original in originals.items():
        setattr(dist, name, _observed(original, *FUNCTIONS[name], observe))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _observed(
    original: Callable[..., Any],
    collective: Collective,
    position: int,
    observe: Observe,
) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        tensor = args[position] if len(args) > position else None
        if isinstance(tensor, Tensor) and not caller.startswith("internlm."):
            # By type, since its position differs between the functions.
            group = next((a for a in (*args, *kwargs.values()) if isinstance(a, dist.ProcessGroup)), None)
            observe(_mode_of(group), collective, tensor)
        return original(*args, **kwargs)

    return call


def _mode_of(group: dist.ProcessGroup | None) -> str:
    """Return the name of the parallel mode whose group has the ranks of ``group``, or else name the ranks."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(ranks) == 1:
        return "this rank alone"  # as groups of several modes may be
    modes = (mode for mode in MODES if gpc.is_initialized(mode) and gpc.get_ranks_in_group(mode) == ranks)
    return next((mode.value for mode in modes), f"ranks {', '.join(map(str, ranks))}")
