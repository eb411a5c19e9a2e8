"""The table of communicators by mode and role."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import Communicator, ParallelLinear
from internlm.core.parallel.attach import TABLE, CommContext, attach_communicators, register_communicator
from internlm.core.parallel.communicator import (
    IDENTITY,
    IDENTITY_ATTENTION,
    IDENTITY_EMBEDDING,
    IDENTITY_HEAD,
    IDENTITY_MODEL,
)
from internlm.core.parallel.initialization import initialize_parameters
from internlm.core.parallel.isp import IspAttention, IspEmbedding, IspHead, IspLinear, IspModel, TokensHead
from internlm.core.parallel.placement import normal
from internlm.core.parallel.sharding import GroupPosition, Sharding, building
from internlm.core.parallel.tensor_parallel import (
    FspColumn,
    HiddenEmbedding,
    MspColumn,
    MtpColumn,
    MtpRow,
    SequenceHead,
    SequenceModel,
    SequenceRow,
    SplitHead,
    VocabEmbedding,
)
from internlm.core.parallel.weight_gatherer import Overlap
from internlm.model.decoder import Decoder
from tests.unit.model.samples import decoder

MODES = ("mtp", "msp", "fsp", "isp")
IDENTITIES = {IDENTITY, IDENTITY_HEAD, IDENTITY_EMBEDDING, IDENTITY_ATTENTION, IDENTITY_MODEL}


def groups(tensor: int = 2, weight: int = 2) -> tuple[Group, Group]:
    """Build groups of these sizes, for communicators that never run."""
    return Group(ParallelMode.TENSOR, None, 1 % tensor, tensor), Group(ParallelMode.WEIGHT, None, 1 % weight, weight)


def split_decoder(mode: str, tensor: int = 2, weight: int = 2, **keys: object) -> Decoder:
    with building(Sharding(mode, GroupPosition(1 % tensor, tensor), GroupPosition(1 % weight, weight))):
        return decoder(**keys)


def communicators(model: nn.Module) -> dict[str, object]:
    """Collect the communicators by the name of their layer."""
    return {name: module.communicator for name, module in model.named_modules() if hasattr(module, "communicator")}


def communicator_types(model: nn.Module) -> dict[str, type]:
    """Collect the types of communicators of the first block and of the layers outside of blocks."""
    return {name: type(comm) for name, comm in communicators(model).items() if "layers.1" not in name}


def expected(model: type, column: type, row: type, head: type, embedding: type, attention: type) -> dict[str, type]:
    return {
        "": model,
        "embedding": embedding,
        "layers.0.attention": attention,
        "layers.0.attention.wqkv": column,
        "layers.0.attention.wo": row,
        "layers.0.feed_forward.w13": column,
        "layers.0.feed_forward.w2": row,
        "output": head,
    }


MODEL, ATTENTION, EMBEDDING = type(IDENTITY_MODEL), type(IDENTITY_ATTENTION), type(IDENTITY_EMBEDDING)


@pytest.mark.parametrize(
    ("mode", "split_hidden", "wanted"),
    [
        ("mtp", True, expected(MODEL, MtpColumn, MtpRow, SplitHead, HiddenEmbedding, ATTENTION)),
        ("mtp", False, expected(MODEL, MtpColumn, MtpRow, SplitHead, VocabEmbedding, ATTENTION)),
        ("msp", True, expected(SequenceModel, MspColumn, SequenceRow, SequenceHead, HiddenEmbedding, ATTENTION)),
        ("msp", False, expected(SequenceModel, MspColumn, SequenceRow, SequenceHead, VocabEmbedding, ATTENTION)),
        ("fsp", True, expected(SequenceModel, FspColumn, SequenceRow, SequenceHead, HiddenEmbedding, ATTENTION)),
        ("fsp", False, expected(SequenceModel, FspColumn, SequenceRow, SequenceHead, VocabEmbedding, ATTENTION)),
        ("isp", True, expected(IspModel, IspLinear, IspLinear, IspHead, IspEmbedding, IspAttention)),
    ],
)
def test_each_role_of_a_decoder_has_its_communicator(mode: str, split_hidden: bool, wanted: dict[str, type]) -> None:
    model = split_decoder(mode, embed_split_hidden=split_hidden)
    attach_communicators(model, mode, *groups())
    assert communicator_types(model) == wanted


def test_a_tied_table_is_split_by_vocabulary() -> None:
    model = split_decoder("mtp", tie_word_embeddings=True)
    attach_communicators(model, "mtp", *groups())
    assert isinstance(model.embedding.communicator, VocabEmbedding)
    assert model.output.communicator.vocab.first == model.embedding.communicator.first == 31


def test_isp_may_split_the_sequence_alone() -> None:
    model = split_decoder("isp", weight=1)
    assert attach_communicators(model, "isp", *groups(weight=1)) is None
    wanted = expected(IspModel, Communicator, Communicator, TokensHead, IspEmbedding, IspAttention)
    assert communicator_types(model) == wanted


def test_isp_may_split_the_weights_alone() -> None:
    model = split_decoder("isp", tensor=1)
    assert attach_communicators(model, "isp", *groups(tensor=1)) is not None
    assert communicator_types(model) == expected(IspModel, IspLinear, IspLinear, IspHead, IspEmbedding, IspAttention)


@pytest.mark.parametrize("mode", MODES)
def test_on_one_rank_every_layer_keeps_its_identity_communicator(mode: str) -> None:
    model = decoder()
    assert attach_communicators(model, mode, *groups(1, 1)) is None
    assert set(communicators(model).values()) == IDENTITIES


def test_tensor_modes_do_not_look_at_the_weight_group() -> None:
    model = decoder()
    attach_communicators(model, "mtp", *groups(1, 2))
    assert set(communicators(model).values()) == IDENTITIES


def test_two_models_may_live_in_one_process() -> None:
    split, whole = split_decoder("mtp"), decoder()
    attach_communicators(split, "mtp", *groups())
    assert set(communicators(whole).values()) == IDENTITIES
    assert not IDENTITIES & {split.output.communicator, split.layers["0"].attention.wo.communicator}


def test_the_gatherer_has_the_linears_in_forward_order() -> None:
    model, overlap = split_decoder("isp"), Overlap(enabled=True, memory_pool=True)
    gatherer = attach_communicators(model, "isp", *groups(), overlap)
    assert gatherer is not None
    assert gatherer.overlap is overlap
    layers = [
        (layer.attention.wqkv, layer.attention.wo, *layer.feed_forward.children()) for layer in model.layers.values()
    ]
    order = [*layers[0], *layers[1], model.output]
    assert [linear.weight for linear in gatherer.linears] == [layer.weight for layer in order]
    assert [layer.communicator.index for layer in order] == list(range(9))
    assert [(linear.block, linear.position) for linear in gatherer.linears] == [
        *((block, position) for block in range(2) for position in range(4)),
        (2, 0),
    ]
    assert [linear.rows for linear in gatherer.linears] == [96, 32, 192, 32, 96, 32, 192, 32, 61]
    assert all(layer.communicator.gatherer is gatherer for layer in order)


# -- custom communicators


class Doubling(Communicator):
    """A communicator that doubles the output."""

    def __init__(self, context: CommContext, layer: nn.Module) -> None:
        self.context, self.layer = context, layer

    def reduce_output(self, y: Tensor) -> Tensor:
        return 2 * y


@pytest.fixture
def _forget() -> Iterator[None]:
    """Restore the table after a test."""
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


class Mine(ParallelLinear):
    """A linear in a role of its own."""

    def __init__(self) -> None:
        super().__init__(4, 3, normal(1.0), role="row")
        self.role = "my role"


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("mode", MODES)
def test_a_custom_role_gets_its_communicator(mode: str) -> None:
    register_communicator(mode, "my role")(Doubling)
    model, x = nn.Sequential(Mine(), nn.ReLU()), torch.ones(2, 4)
    initialize_parameters(model, seed=1)
    before = model[0](x)
    attach_communicators(model, mode, *groups())
    comm = model[0].communicator
    assert isinstance(comm, Doubling)
    assert comm.layer is model[0]
    assert (comm.context.tensor, comm.context.weight) == groups()
    assert torch.equal(model[0](x), 2 * before)


@pytest.mark.usefixtures("_forget")
def test_a_custom_role_keeps_its_communicator_in_other_modes() -> None:
    register_communicator("isp", "my role")(Doubling)
    layer = Mine()
    attach_communicators(layer, "mtp", *groups())
    assert layer.communicator is IDENTITY


@pytest.mark.usefixtures("_forget")
def test_a_built_in_role_may_be_registered_again() -> None:
    register_communicator("mtp", "row")(Doubling)
    model = split_decoder("mtp")
    attach_communicators(model, "mtp", *groups())
    assert isinstance(model.layers["0"].attention.wo.communicator, Doubling)
    assert isinstance(model.layers["0"].attention.wqkv.communicator, MtpColumn)


@pytest.mark.usefixtures("_forget")
def test_the_decorator_returns_the_function() -> None:
    def build(context: CommContext, layer: nn.Module) -> Communicator:
        return IDENTITY

    assert register_communicator("isp", "my role")(build) is build
    assert TABLE["isp", "my role"] is build
