"""``model.compile``: blocks go through torch.compile, one by one.

All blocks are alike, so the first is compiled and the others take what it got. Names, placements, hooks and checkpoints
know nothing of it: the modules stay what they are, and what is compiled is what they do when they are called.
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
from internlm.core.parallel.blocks import declared_blocks
from internlm.utils.errors import ConfigError, Problem, UserError
from internlm.utils.torch_private import compile_counters, compiler_failure, prepare_compiler

KEY = "model.compile"


def compile_blocks(model: nn.Module) -> None:
    """Have each block of ``model`` compiled when it is first called; raises :class:`ConfigError` where there are none.

    Hooks of a block itself run outside of what is compiled.
    """
    blocks = list(declared_blocks(model).values())
    if not blocks:
        what = f"{type(model).__name__} declares no blocks"
        raise ConfigError(
            Problem(KEY, what, "Give it a method blocks() that returns its layers, or set the key to False")
        )
    prepare_compiler()
    for block in blocks:
        forward = block.forward
        if isinstance(forward, BlockForward):  # compile inside of recompute and offloading, which are not for a graph
            forward.compute = partial(_call, torch.compile(forward.compute))
        else:
            block.forward = partial(_call, torch.compile(forward))


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is a block that :func:`compile_blocks` had."""
    forward = module.forward
    if isinstance(forward, BlockForward):
        forward = forward.compute
    return isinstance(forward, partial) and forward.func is _call


def _call(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return compiled(*args, **kwargs)
    except Exception as error:
        reason = compiler_failure(error)
        if reason is None:
            raise
        what = f"a block can't be compiled ({reason})".splitlines()[0]
        raise UserError(Problem(KEY, what, "See that there is a C++ compiler, or set it to False")) from error


@dataclass(frozen=True)
class Compiled:
    """What this process has compiled so far."""

    graphs: int
    breaks: Mapping[str, int]
    """Places where a graph had to end, and Python went on: how many, by reason."""


def compiled_so_far() -> Compiled:
    """Return the numbers of graphs and graph breaks so far; a step that compiles nothing leaves them unchanged."""
    counters = compile_counters()
    breaks: dict[str, int] = {}
    for text, count in counters["graph_break"].items():
        reason = _reason(text)
        breaks[reason] = breaks.get(reason, 0) + count
    return Compiled(counters["stats"]["unique_graphs"], breaks)


def _reason(text: str) -> str:
    """The reason that was given where compiling was switched off, else what torch says, its first line."""
    given = re.search(r"\(reason: (.*)\)", text)
    return given[1] if given else text.splitlines()[0]
