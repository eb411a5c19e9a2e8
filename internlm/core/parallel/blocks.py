"""Blocks: the repeated layers of a model, declared by the model itself.

Full sharding, lazy parameter all-gathers, isp's weight prefetch, activation checkpointing, offloading and
``torch.compile`` are applied block by block. A model declares its blocks in a ``blocks()`` method; a model without
this method has no blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Protocol, cast

from torch import nn

from internlm.utils.errors import Problem, UserError


class DeclaresBlocks(Protocol):
    """Protocol for a model that declares its repeated layers."""

    def blocks(self) -> Iterable[nn.Module]:
        """Return the blocks in the order in which a forward pass calls them."""


def declared_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the declared blocks of ``model`` by module name, in forward order, or an empty dict if there are none.

    Raises:
        UserError: ``model.blocks()`` raises TypeError, or returns an object that is not a submodule of ``model``, a
            block twice, or a block within another block.
    """
    # Looked up on the class: ``self.blocks = nn.ModuleList(...)`` is a common attribute and not a declaration.
    if not inspect.isfunction(getattr(type(model), "blocks", None)):
        return {}
    names = {module: name for name, module in model.named_modules()}
    blocks: dict[str, nn.Module] = {}
    for block in _declaration(model):
        name = names.get(block, "")
        if not name:  # unknown, or the model itself: wrapping the model as a block would recurse endlessly
            message = f"returned a {type(block).__name__} that is not a submodule of the model"
            raise _error(model, message, "Return only submodules of the model")
        if name in blocks:
            raise _error(model, f"returned {name!r} twice", "Return each block once")
        blocks[name] = block
    for name in blocks:
        outer = containing_block(name.rpartition(".")[0], blocks)
        if outer in blocks:
            raise _error(model, f"returned {name!r}, which lies within block {outer!r}", "Return only one of the two")
    return blocks


def _declaration(model: nn.Module) -> list[nn.Module]:
    """Call ``model.blocks()`` and check that it returns modules."""
    todo = "Define blocks(self) to return the repeated layers in forward order"
    try:
        blocks = list(cast(DeclaresBlocks, model).blocks())
    except TypeError as error:  # the method takes other arguments, or its result is not iterable
        raise _error(model, f"call failed with TypeError: {error}", todo) from error
    for block in blocks:
        if not isinstance(block, nn.Module):
            raise _error(model, f"expected every block to be an nn.Module, got {type(block).__name__}", todo)
    return blocks


def containing_block(name: str, blocks: Mapping[str, nn.Module]) -> str:
    """Return the name of the block that contains the module ``name``, or ``name`` itself if no block does."""
    prefix = name
    while prefix:
        if prefix in blocks:
            return prefix
        prefix = prefix.rpartition(".")[0]
    return name


def mark_compiled(block: nn.Module) -> None:
    """Mark the forward of ``block`` as compiled, so that no hooks are registered on the modules within it."""
    block.forward_is_compiled = True  # type: ignore[assignment]


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module`` is a block with a compiled forward."""
    return getattr(module, "forward_is_compiled", False) is True


def _error(model: nn.Module, message: str, todo: str) -> UserError:
    return UserError(Problem(f"{type(model).__name__}.blocks()", message, todo))
