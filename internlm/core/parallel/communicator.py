"""What a parallel linear says to the other ranks, and when.

A communicator has six hooks around the three matrix products of a linear layer; each is the identity here. A
parallel mode is a small subclass that overrides the hooks it needs, attached per instance of a layer.
"""

from __future__ import annotations

from torch import Tensor


class Communicator:
    """Says nothing: the layer is whole on each rank."""

    #: Whether ``gather_weight`` gathers and ``reduce_grad_weight`` reduces to this rank's shard.
    splits_weight = False

    def gather_input(self, x: Tensor) -> Tensor:
        """Before the forward product: the input that the product needs."""
        return x

    def gather_weight(self, weight: Tensor) -> Tensor:
        """Before the forward and the backward product: the weight that the product needs."""
        return weight

    def reduce_output(self, y: Tensor) -> Tensor:
        """After the forward product."""
        return y

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """Before the backward products."""
        return dy

    def reduce_grad_input(self, dx: Tensor) -> Tensor:
        """After the product for the input's gradient."""
        return dx

    def reduce_grad_weight(self, dw: Tensor) -> Tensor:
        """After the product for the weight's gradient."""
        return dw


#: Layers start with this one.
SILENT = Communicator()
