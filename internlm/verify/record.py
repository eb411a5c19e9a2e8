"""Record of one rank's run: plain data that can be sent between processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import NamedTuple, TypeAlias

from torch import Tensor

from internlm.accelerator import to_host
from internlm.core.parallel.ledger import Collective, Traffic
from internlm.core.parallel.placement import TensorSlice

Offsets: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class TensorShards:
    """Slices of one logical tensor that a rank stores, by their offsets in the tensor."""

    shape: tuple[int, ...]
    slices: dict[Offsets, Tensor]


#: Shards by the logical name of their tensor.
ShardsByName: TypeAlias = dict[str, TensorShards]


#: Name of the whole model in reports; its name as a module is empty.
THE_MODEL = "the model"


class Site(NamedTuple):
    """Place of a tensor in a forward or backward pass: an input or output of a module, or the gradient of one."""

    module: str
    """Name of the module; empty for the model itself."""
    slot: str
    """Which of the module's tensors: ``""`` if it returns one, else ``.FIELD`` or ``[INDEX]``."""
    is_input: bool = False
    is_gradient: bool = False

    @property
    def tensor(self) -> str:
        """Name of the tensor: that of the module, followed by the slot."""
        return f"{self.module or THE_MODEL}{self.slot}"

    @property
    def is_batch(self) -> bool:
        """Whether the loader reads the tensor: an input of the model, other than the weight of a token in the loss."""
        return not self.module and self.is_input and not self.is_gradient and self.slot != ".grad_scale"

    def __str__(self) -> str:
        return f"{'gradient of the ' * self.is_gradient}{'input' if self.is_input else 'output'}{self.slot}"


class Call(NamedTuple):
    """Collective that a rank called during a pass."""

    module: str | None
    """Module that was running; None: none was, the pass was over or had not begun."""
    in_backward: bool
    mode: str
    """Parallel mode of the group."""
    collective: Collective
    sent: Tensor | None = None
    """Copy of the tensor that the rank passed in; None: it was not kept."""


@dataclass
class Pass:
    """Tensors of one micro-batch in order of execution, and the collectives that were called meanwhile."""

    tensors: dict[Site, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    callers: dict[str, str | None] = field(default_factory=dict)
    """Module that was running when a module was first called; None for the model."""

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Outputs of modules by name, in the order in which the modules returned."""
        return self._of_outputs(gradients=False)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the outputs of modules by the name of the output, in the order in which they were computed."""
        return self._of_outputs(gradients=True)

    def _of_outputs(self, gradients: bool) -> dict[str, Tensor]:
        of_outputs = ((site, tensor) for site, tensor in self.tensors.items() if not site.is_input)
        return {site.tensor: tensor for site, tensor in of_outputs if site.is_gradient == gradients}


@dataclass
class Details:
    """Details of one step, recorded only for the search for a culprit."""

    step: int = 0
    """Index of the step that is recorded."""
    initial: ShardsByName = field(default_factory=dict)
    """Parameters before the recorded step."""
    accumulated: list[dict[str, Tensor]] = field(default_factory=list)
    """Gradients that this rank has accumulated when each micro-batch begins, by logical name: only whole tensors, so
    of one process."""
    order: list[str] = field(default_factory=list)
    """Logical names of the parameters in module order."""
    calls: list[Call] = field(default_factory=list)
    """Collectives outside of the recorded passes."""


@dataclass(frozen=True)
class RankCoordinates:
    """Ranks of a process within its data, tensor, pipeline and ZeRO-1 groups."""

    data: int
    tensor: int
    stage: int
    zero: int = 0


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """Losses, tensors, traffic and module outputs of one rank's run."""

    coordinates: RankCoordinates
    losses: list[float]
    sums: list[list[float]]
    """Sums over the batch of the recorded step, [3, types]: summed loss, correct predictions and valid tokens."""
    norms: list[float]
    """Global gradient norms, before clipping."""
    gradients: ShardsByName
    """Gradients after the backward pass of the recorded step: reduced over the ranks, not clipped."""
    parameters: ShardsByName
    """Parameters after the last step."""
    passes: list[Pass]
    """Tensors of each recorded micro-batch of the recorded step."""
    traffic: list[Traffic]
    """Traffic of each step."""
    tokens: list[list[int]]
    """Number of labels that count in the loss, by step and micro-batch."""
    types: int
    """Number of dataset types."""
    peak_in_flight: int
    """Largest number of (chunk, micro-batch) pairs whose activations were stored at once."""
    details: Details | None = None
    """Present if they were asked for."""


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in host memory, which can be sent to another process."""
    # A copy also of a host tensor: buffers go on changing, and pickling a view would send its whole storage.
    return to_host(tensor, "record of a comparison").clone()


def index_of(offsets: Offsets, values: Tensor) -> tuple[slice, ...]:
    """Return the index of a slice in its logical tensor."""
    return tuple(slice(start, start + size) for start, size in zip(offsets, values.shape, strict=True))


def add_shards(
    shards: ShardsByName,
    name: str,
    shape: tuple[int, ...],
    slices: Iterable[TensorSlice],
    flat: Tensor,
    begin: int = 0,
) -> None:
    """Copy slices of a logical tensor from a flat buffer, and add the copies to ``shards``.

    The values of each slice are ``flat[begin + slice.start : begin + slice.stop]``.

    Args:
        shards: Shards to add to, changed in place.
        name: Logical name of the tensor.
        shape: Global shape of the tensor.
        slices: Slices of the tensor to add.
        flat: Buffer that contains the values of the slices, [N].
        begin: Value to add to ``start`` and ``stop`` of a slice to get its range in ``flat``; it may be negative.
    """
    of_tensor = shards.setdefault(name, TensorShards(shape, {}))
    for part in slices:
        values = flat[begin + part.start : begin + part.stop]
        of_tensor.slices[part.offsets] = host_copy(values.view(part.sizes))


def by_sample(records: Iterable[RankRecord]) -> Mapping[int, Mapping[int, list[RankRecord]]]:
    """Group the records by data-parallel rank, then by pipeline stage; each group is in the order of tensor ranks."""
    grouped: dict[int, dict[int, list[RankRecord]]] = {}
    for record in sorted(records, key=lambda record: astuple(record.coordinates)):
        at = record.coordinates
        grouped.setdefault(at.data, {}).setdefault(at.stage, []).append(record)
    return grouped  # dicts keep the order of insertion, here that of the coordinates
