"""Memory check before a model is built: the memory plan of this rank against the memory that is free."""

from __future__ import annotations

from internlm import accelerator
from internlm.config import Config
from internlm.costs import NoCostFormulaError, ParamInventory, Plan, memory_plan
from internlm.costs.memory_plan import format_bytes
from internlm.train.inventory import build_inventory
from internlm.utils.errors import ConfigError, Problem

#: A plan may exceed the free memory by this factor: it is exact for parameters, but not for activations.
TOLERANCE = 1.1
TODO = "Use more ranks, a smaller model or smaller micro-batches; internlm memory prints the plan row by row"


def check_memory(
    config: Config, world_size: int, stage: int, zero_rank: int | None = None, *, trains: bool = True
) -> None:
    """Check that the free memory suffices for a rank of pipeline stage ``stage``.

    ``zero_rank`` is its rank within the zero group; by default the rank that holds the most bytes. Unless the rank
    ``trains``, only its parameters count.

    Without this check, an allocator fails in the middle of building the model, or the system kills the process. A model
    that cannot be built on the meta device is not checked.

    Raises:
        ConfigError: The memory does not suffice, or the sizes of the model are too large for any tensor.
    """
    try:
        inventory = build_inventory(config, world_size, stage)  # also where no memory is limited: it checks the sizes
    except NoCostFormulaError:
        return
    free = accelerator.free_memory()
    if free is None:
        return
    # Parameters first: the layout of the flat buffers has an entry per bucket, which is itself too large for a model
    # of absurd size.
    smallest = _parameters(inventory)
    needed = smallest if not trains or smallest > free * TOLERANCE else sum(_plan(inventory, zero_rank).values())
    if needed > free * TOLERANCE:
        message = f"a rank needs {format_bytes(needed)} of memory, but only {format_bytes(free)} are free"
        raise ConfigError(Problem("model", message, TODO))


def _plan(inventory: ParamInventory, zero_rank: int | None) -> Plan:
    return memory_plan(inventory, zero_rank=zero_rank, device_type=accelerator.device_type())


def _parameters(inventory: ParamInventory) -> int:
    """Return the bytes of all parameters of a rank, without padding and optimizer states."""
    groups = inventory.groups
    return sum(
        (shard.numel_per_rank(groups.z) if groups.shares_parameters else shard.numel) * shard.dtype.itemsize
        for shard in inventory.shards
    )
