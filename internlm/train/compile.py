"""Compilation of each block with ``torch.compile`` (config key ``model.compile``).

All blocks have the same code, so the first is compiled and the others reuse its graphs. Only ``forward`` is replaced:
module names, placements, hooks and checkpoints do not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from internlm.core.parallel.block_forward import BlockForward
from internlm.core.parallel.blocks import declared_blocks, mark_compiled
from internlm.utils.errors import ConfigError, Problem, UserError
from internlm.utils.torch_private import compile_counters, compiler_failure, prepare_compiler

KEY = "model.compile"


def compile_blocks(model: nn.Module) -> None:
    """Replace the forward of each declared block of ``model`` by a function that is compiled at its first call.

    Hooks, recompute and offloading of a block run outside of its graph.

    Raises:
        ConfigError: ``model`` declares no blocks.
    """
    blocks = list(declared_blocks(model).values())
    if not blocks:
        message, todo = (
            f"{type(model).__name__} declares no blocks",
            "Give it a method blocks() that returns its layers",
        )
        raise ConfigError(Problem(KEY, message, f"{todo}, or set model.compile=False"))
    prepare_compiler()
    for block in blocks:
        forward = block.forward
        if isinstance(forward, BlockForward):
            # Compile only what is recomputed. If the graph included activation checkpointing, torch's partitioner would
            # choose the tensors to recompute, and the hooks that offload saved tensors would break the graph.
            forward.compute = partial(_call, torch.compile(forward.compute))
        else:
            block.forward = partial(_call, torch.compile(forward))
        mark_compiled(block)


def _call(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return compiled(*args, **kwargs)
    except Exception as error:
        reason = compiler_failure(error)
        if reason is None:
            raise
        message = f"a block cannot be compiled ({reason})".splitlines()[0]
        raise UserError(Problem(KEY, message, "Install a C++ compiler, or set model.compile=False")) from error


@dataclass(frozen=True)
class Compiled:
    """Counts of compiled graphs and of graph breaks in this process."""

    graphs: int
    breaks: Mapping[str, int]
    """Number of graph breaks by reason."""


def compiled_so_far() -> Compiled:
    """Return the counts of compiled graphs and of graph breaks up to now."""
    counters = compile_counters()
    breaks: dict[str, int] = {}
    for text, count in counters["graph_break"].items():
        reason = _reason(text)
        breaks[reason] = breaks.get(reason, 0) + count
    return Compiled(counters["stats"]["unique_graphs"], breaks)


def _reason(text: str) -> str:
    """Return the reason for ``torch.compiler.disable`` in a graph-break message, or else the message's first line."""
    # The lines after the first are explanations and hints, too long for a log.
    given = re.search(r"\(reason: (.*)\)", text)
    return given[1] if given else text.splitlines()[0]
