"""Placements of weights and biases by mode and role."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import ParallelEmbedding, ParallelHead, ParallelLinear, ParallelNorm, ParamPlacement
from internlm.core.parallel.param_state import placement_of
from internlm.core.parallel.placement import ShardSpec, constant, normal
from internlm.core.parallel.sharding import CUSTOM_ROLES, GroupPosition, Sharding, building, current_sharding
from internlm.utils.errors import UserError

INIT = normal(1.0)
MODES = ("mtp", "msp", "fsp", "isp")
TENSOR_MODES = MODES[:3]
TENSOR, WEIGHT = GroupPosition(1, 2), GroupPosition(3, 4)
HIDDEN = ("column", "row")
ROLES = ("column", "row", "head", "embedding", "embedding by hidden units")


def sharding(mode: str) -> Sharding:
    return Sharding(mode, TENSOR, WEIGHT)


def over_tensor(axis: int | None) -> ShardSpec:
    return ShardSpec(ParallelMode.TENSOR, 1, 2, axis)


#: Role, shape, split axis, the axis along which two ranks split the weight, and the shape of a half.
WEIGHTS: list[tuple[str, tuple[int, ...], int, int | None, tuple[int, ...]]] = [
    ("column", (6, 8), 0, 0, (3, 8)),
    ("column", (2, 6, 8), 0, 0, (1, 6, 8)),
    ("column", (2, 6, 8), 1, 1, (2, 3, 8)),
    ("row", (7, 8), 0, 1, (7, 4)),
    ("head", (7, 8), 0, None, (4, 8)),
    ("embedding", (7, 8), 0, None, (4, 8)),
    ("embedding by hidden units", (7, 8), 0, 1, (7, 4)),
]


@pytest.mark.parametrize("mode", TENSOR_MODES)
@pytest.mark.parametrize(("role", "shape", "axis", "split", "local"), WEIGHTS)
def test_weights_over_the_tensor_group(
    mode: str, role: str, shape: tuple[int, ...], axis: int, split: int | None, local: tuple[int, ...]
) -> None:
    placement = sharding(mode).weight_of(role, shape, INIT, axis)
    assert placement == ParamPlacement(shape, INIT, shard=over_tensor(split), is_hidden=role in HIDDEN)
    assert placement.local_shape == local


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("shape", "local"), [((8, 5), (2, 5)), ((7, 5), (2, 5)), ((2, 5, 3), (3, 3)), ((3, 5), (1, 5))]
)
def test_weights_under_isp_are_split_by_rows(role: str, shape: tuple[int, ...], local: tuple[int, ...]) -> None:
    placement = sharding("isp").weight_of(role, shape, INIT, axis=1)
    shard = ShardSpec(ParallelMode.WEIGHT, 3, 4, None)
    assert placement == ParamPlacement(shape, INIT, shard=shard, is_hidden=role in HIDDEN)
    assert placement.local_shape == local


@pytest.mark.parametrize(("shape", "axis", "local"), [((6,), 0, (3,)), ((2, 6), 0, (1, 6)), ((2, 6), 1, (2, 3))])
@pytest.mark.parametrize("mode", TENSOR_MODES)
def test_biases_of_column_linears_are_split_like_the_output(
    mode: str, shape: tuple[int, ...], axis: int, local: tuple[int, ...]
) -> None:
    placement = sharding(mode).bias_of("column", shape, INIT, axis)
    assert placement == ParamPlacement(shape, INIT, shard=over_tensor(axis), is_matrix=False)
    assert placement.local_shape == local


PARTIAL = {"mtp": None, "msp": ParallelMode.TENSOR, "fsp": ParallelMode.TENSOR, "isp": ParallelMode.WEIGHT}


@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_whole_and_partial_where_tokens_are_split(mode: str) -> None:
    wanted = ParamPlacement((6,), INIT, partial_over=PARTIAL[mode], is_matrix=False)
    assert sharding(mode).replicated((6,), INIT) == wanted
    assert sharding(mode).bias_of("row", (6,), INIT) == wanted
    assert wanted.local_shape == (6,)


def test_biases_under_isp_are_whole() -> None:
    isp = sharding("isp")
    assert isp.bias_of("column", (2, 6), INIT, 1) == isp.replicated((2, 6), INIT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ROLES)
def test_on_one_rank_nothing_is_split(mode: str, role: str) -> None:
    placement = Sharding(mode).weight_of(role, (7, 9), INIT)
    assert placement == ParamPlacement((7, 9), INIT, is_hidden=role in HIDDEN)
    assert Sharding(mode).bias_of("column", (7,), INIT).shard is None


def test_a_mode_ignores_the_group_of_another() -> None:
    assert Sharding("isp", tensor=TENSOR).weight_of("column", (6, 8), INIT).shard is None
    assert Sharding("mtp", weight=WEIGHT).weight_of("column", (6, 8), INIT).shard is None


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_role_is_an_error_under_tensor_modes(mode: str) -> None:
    """Under isp all weights are split alike, whatever they are for."""
    if mode == "isp":
        assert sharding(mode).weight_of("mine", (8, 4), INIT).local_shape == (2, 4)
    else:
        with pytest.raises(UserError, match=r"layer role 'mine': unknown, expected one of column, row, head"):
            sharding(mode).weight_of("mine", (8, 4), INIT)


@pytest.mark.parametrize("mode", MODES)
def test_a_custom_role_is_split_like_the_one_it_names(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CUSTOM_ROLES, "mine", "row")
    for place in (Sharding.weight_of, Sharding.bias_of):
        mine, row = (place(sharding(mode), role, (8, 4), INIT) for role in ("mine", "row"))
        assert mine == row


# -- the layers being built


def test_building_nests_and_restores() -> None:
    outer, inner, alone = sharding("mtp"), sharding("isp"), Sharding()
    assert current_sharding() == alone
    with building(outer):
        assert current_sharding() is outer
        with building(inner):
            assert current_sharding() is inner
        assert current_sharding() is outer
    assert current_sharding() == alone


def test_building_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="no"), building(sharding("mtp")):
        raise RuntimeError("no")
    assert current_sharding() == Sharding()


def shards(mode: str) -> dict[str, Any]:
    """Collect shard and partial group of every parameter of the layers of this package."""
    with building(sharding(mode)):
        layers = {
            "column": ParallelLinear(4, (2, 6), INIT, bias=True, split_axis=1),
            "row": ParallelLinear(6, 4, INIT, bias=True, role="row"),
            "head": ParallelHead(4, 9, INIT),
            "embedding": ParallelEmbedding(9, 4, 1.0),
            "units": ParallelEmbedding(9, 4, 1.0, split_hidden=True),
            "norm": ParallelNorm(4, "layernorm", 1e-5),
        }
    return {
        f"{name} {of}": (placement_of(parameter).shard, placement_of(parameter).partial_over)
        for name, layer in layers.items()
        for of, parameter in layer.named_parameters()
    }


@pytest.mark.parametrize("mode", TENSOR_MODES)
def test_parameters_of_layers_are_split_over_the_tensor_group(mode: str) -> None:
    whole = (None, PARTIAL[mode])
    assert shards(mode) == {
        "column weight": (over_tensor(1), None),
        "column bias": (over_tensor(1), None),
        "row weight": (over_tensor(1), None),
        "row bias": whole,
        "head weight": (over_tensor(None), None),
        "embedding weight": (over_tensor(None), None),
        "units weight": (over_tensor(1), None),
        "norm weight": whole,
        "norm bias": whole,
    }


def test_parameters_of_layers_are_split_over_the_weight_group() -> None:
    split, whole = (ShardSpec(ParallelMode.WEIGHT, 3, 4), None), (None, ParallelMode.WEIGHT)
    for name, found in shards("isp").items():
        assert found == (whole if "bias" in name or "norm" in name else split), name


def test_isp_splits_the_rows_of_an_embedding_that_others_split_by_hidden_size() -> None:
    with building(sharding("isp")):
        layer = ParallelEmbedding(8, 4, 1.0, split_hidden=True)
    assert layer.weight.shape == (2, 4)


def test_the_initialiser_is_kept_whatever_is_split() -> None:
    ones = constant(1.0)
    assert all(sharding(mode).weight_of(role, (8, 8), ones).init is ones for mode in MODES for role in ROLES)
