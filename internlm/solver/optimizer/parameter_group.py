"""What update rules, the gradient norm and checkpoints know of the parameters of one kind, wherever they lie.

Of the elements that it owns, its *shard*, a rank has main parameters, gradients that are reduced, and the state of the
optimizer. A shard comes in parts. What is kept for it besides is one tensor, in which the parts lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.core.parallel.fully_sharded import held
from internlm.core.parallel.placement import ParamPlacement
from internlm.ops.precision import wide
from internlm.solver.optimizer.kinds import Kind
from internlm.utils.errors import Problem, UserError


@dataclass(frozen=True)
class Piece:
    """The part of one parameter's flattened local tensor that lies in a shard: elements [start, stop), and [lo, hi) of
    part ``number``."""

    name: str
    placement: ParamPlacement
    start: int
    stop: int
    number: int
    lo: int
    hi: int


class ParameterGroup:
    """Parameters of one kind, and this rank's shard of them."""

    kind: Kind
    #: Where gradients are added up, whether this rank owns them or not.
    grads: Tensor
    #: Main parameters of the shard.
    main_parts: list[Tensor]
    #: Gradients of the shard, once they are reduced.
    grad_parts: list[Tensor]

    @property
    def main_dtype(self) -> torch.dtype:
        """Type of main parameters, reduced gradients and the optimizer's state."""
        return wide(self.kind.dtype)

    @property
    def has_main(self) -> bool:
        """Whether main parameters are wider than what is computed with."""
        return self.kind.dtype != self.main_dtype

    @property
    def owned(self) -> int:
        """Elements of the shard."""
        return sum(map(len, self.main_parts))

    def new_state(self) -> Tensor:
        """Zeros for each element of the shard."""
        return torch.zeros(self.owned, dtype=self.main_dtype, device=self.main_parts[0].device)

    def split(self, state: Tensor) -> list[Tensor]:
        """The parts of one tensor over the shard, as views."""
        return list(state.split([*map(len, self.main_parts)]))

    def pieces(self) -> Iterator[Piece]:
        """Which parts of which parameters the shard holds, in its order."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """The gradient of each parameter as this rank has it before :class:`HybridZeroOptimizer` reduces it, with the
        parameter's place in the model and its name."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Forget the gradients. Raises :class:`UserError` where the whole model was moved to other memory."""
        name, parameter, memory = self._first()
        if held(parameter).flat.data_ptr() != memory.data_ptr():
            what = f"{name!r} does not lie where the optimizer put it, so updates would not reach it"
            raise UserError(Problem("model", what, "Call model.to() or .half() before the optimizer is made"))
        self.grads.zero_()

    def _first(self) -> tuple[str, Tensor, Tensor]:
        """Name of the first parameter, the parameter itself, and the memory that it had when the group was made."""
        raise NotImplementedError

    def main_to_values(self) -> None:
        """Round wider main parameters into this rank's shard of what is computed with, if it is kept."""

    def values_to_main(self) -> None:
        """The inverse, after the others were set."""
