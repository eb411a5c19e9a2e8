"""msp and fsp: tensor parallelism whose activations between the linears are split along the sequence (Korthikanti et
al. 2022, arXiv 2205.05198, section 4.2)."""

from __future__ import annotations

from torch import Tensor

from internlm.core.context.group import Group
from internlm.core.parallel.collectives import (
    Pending,
    all_gather,
    all_to_all,
    begin_all_gather,
    begin_reduce_scatter,
    reduce_scatter,
)
from internlm.core.parallel.communicator import Communicator, ModelCommunicator
from internlm.core.parallel.exchange import exchange
from internlm.core.parallel.tensor import SplitHead


class FspColumn(Communicator):
    """All-gather of the sequence forward, and again backward, under the product for the input's gradient, which is
    reduce-scattered."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        return tokens * self.group.size

    def gather_input(self, x: Tensor) -> Pending:
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return begin_reduce_scatter(dx, self.group)


class MspColumn(FspColumn):
    """The same, but what forward gathered is kept."""

    keeps_gathered_input = True


class SequenceRow(Communicator):
    """Reduce-scatter of the output forward, all-gather of its gradient backward."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def output_tokens(self, tokens: int) -> int:
        return tokens // self.group.size

    def reduce_output(self, y: Tensor) -> Tensor:
        return reduce_scatter(y, self.group)

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        return all_gather(dy, self.group)


class SequenceHead(SplitHead):
    """A head split over the vocabulary, whose input is split along the sequence."""

    def gather_input(self, x: Tensor) -> Pending:
        return begin_all_gather(x, self.group)

    def reduce_grad_input(self, dx: Tensor) -> Pending:
        return begin_reduce_scatter(dx, self.group)

    def enter(self, x: Tensor) -> Tensor:
        return exchange(x, lambda x: all_gather(x, self.group), lambda dx: reduce_scatter(dx, self.group))


class SequenceModel(ModelCommunicator):
    """The loader gives every rank all tokens of a row; between the layers each has its part of them."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def tokens_between_layers(self, tokens: int) -> int:
        return tokens // self.group.size


def sum_to_tokens(x: Tensor, group: Group) -> Tensor:
    """Parts of a sum, [T, H], to the sum for this rank's tokens, [T / n, H]."""
    return exchange(x, lambda x: reduce_scatter(x, group), lambda dx: all_gather(dx, group))


def units_to_tokens(x: Tensor, group: Group) -> Tensor:
    """This rank's hidden units of all tokens, [T, H / n], to all units of this rank's tokens, [T / n, H]."""

    def there(x: Tensor) -> Tensor:
        parts = all_to_all(x.view(group.size, -1, x.shape[1]), group)  # [n, T / n, H / n]
        return parts.transpose(0, 1).flatten(1)

    def back(dx: Tensor) -> Tensor:
        parts = dx.view(dx.shape[0], group.size, -1).transpose(0, 1).contiguous()
        return all_to_all(parts, group).flatten(0, 1)

    return exchange(x, there, back)
