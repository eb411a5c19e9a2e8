"""Initial values are draws by key and logical index: the same in every layout, normal, and independent."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from internlm.core.context.layout import ParallelMode
from internlm.core.context.random import derived_seed
from internlm.core.parallel import ParallelLinear, ParamPlacement, place, place_replicated
from internlm.core.parallel.initialization import CHUNK, draw, initialize_parameters, materialize, normal_chunks
from internlm.core.parallel.layers import ParallelHead
from internlm.core.parallel.param_state import deferred_memory, set_compute_dtype
from internlm.core.parallel.placement import Init, ShardSpec, TensorSlice, constant, normal
from internlm.core.parallel.sharding import GroupPosition, Sharding, building
from internlm.utils.errors import UserError

COUNT = 1_000_000
CPU = torch.device("cpu")


def drawn(
    placement: ParamPlacement, name: str = "w", seed: int = 1, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    held = place(placement)
    held.data = held.data.to(dtype).fill_(math.nan)
    draw(held, name, seed)
    return held.detach()


def elements(key: int, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    held = TensorSlice(offsets, sizes, 0, math.prod(sizes))
    return np.concatenate([chunk.copy() for chunk in normal_chunks(key, shape, held)]).reshape(sizes)


def sample(name: str) -> np.ndarray:
    return drawn(ParamPlacement((COUNT,), normal(1.0)), name).double().numpy()


# -- what an element is


def by_hand(key: int, index: int) -> float:
    """SplitMix64 and Box-Muller in Python's integers and float64, from a u that float32 can represent."""
    mask = 2**64 - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    u, low = float(np.float32((z >> 33) | 1)) * 2**-31, z & 0xFFFFFFFF
    angle = math.pi * (low - 2**32 * (low >> 31)) * 2**-32
    return math.sqrt(-2 * math.log(u)) * math.sin(angle)


@pytest.mark.parametrize("seed", [1, 2**31])
def test_an_element_is_the_box_muller_transform_of_its_hash(seed: int) -> None:
    values = drawn(ParamPlacement((100, 200), normal(1.0)), "layers.3.w", seed).flatten()
    key = derived_seed(seed, "parameter", "layers.3.w")
    expected = torch.tensor([by_hand(key, index) for index in range(len(values))], dtype=torch.float64)
    assert torch.allclose(values.double(), expected, rtol=0, atol=1e-6)


def test_the_first_elements_of_a_key_do_not_change() -> None:
    """Checkpoints are compared with runs of other versions, so the bits are part of the interface."""
    assert elements(7, (4,), (0,), (4,)).view(np.uint32).tolist() == [1067197927, 3201472622, 3199201914, 1065208073]


def test_extreme_words_give_finite_values() -> None:
    """Among four million elements the largest is near the expected maximum, 5.2, and none is infinite or nan."""
    values = elements(3, (4 * COUNT,), (0,), (4 * COUNT,))
    assert np.isfinite(values).all()
    assert 4.8 < np.abs(values).max() < 6.6  # √(2·31·ln 2)


# -- layouts


@st.composite
def cuts(draw_: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, and the offsets and sizes of a slice of it; runs are shorter and longer than a chunk."""
    shape = draw_(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    shape[-1] *= draw_(st.sampled_from([1, 100, CHUNK // 2 + 1, CHUNK + 3]))
    offsets = [draw_(st.integers(0, size - 1)) for size in shape]
    sizes = [draw_(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    return tuple(shape), tuple(offsets), tuple(sizes)


@settings(max_examples=60, deadline=None)
@given(cuts())
def test_a_slice_is_drawn_as_part_of_the_whole_wherever_it_is_cut(
    cut: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, offsets, sizes = cut
    whole = elements(5, shape, (0,) * len(shape), shape)
    here = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    assert np.array_equal(elements(5, shape, offsets, sizes), whole[here])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shards_of_every_layout_are_parts_of_the_whole(data: st.DataObject) -> None:
    """By any axis, or by rows with padding, and in any number of ranks."""
    shape, count = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3)), data.draw(st.integers(1, 9))
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    if axis is not None:
        shape[axis] *= count
    whole = ParamPlacement(tuple(shape), normal(0.02))
    values = drawn(whole)
    for index in range(count):
        shard = replace(whole, shard=ShardSpec(ParallelMode.TENSOR, index, count, axis))
        held, expected = drawn(shard), shard.shard_of(values)
        assert torch.equal(held.flatten()[: expected.numel()], expected.flatten())
        assert not held.flatten()[expected.numel() :].any(), "padding is zero"


def test_a_value_does_not_depend_on_its_position_in_a_chunk() -> None:
    """Vector instructions take the first elements of a chunk, scalar ones may take the last."""
    whole = elements(9, (3 * CHUNK,), (0,), (3 * CHUNK,))
    for start in (1, 2, 3, 5, 7, 8, 15, 31, CHUNK - 1):
        assert np.array_equal(elements(9, (3 * CHUNK,), (start,), (2 * CHUNK,)), whole[start : start + 2 * CHUNK])


# -- distributions


@pytest.mark.parametrize("name", ["embedding.weight", "layers.0.attention.wqkv.weight", "output.weight"])
def test_draws_are_standard_normal(name: str) -> None:
    """Moments within 4.5 standard errors, and the Kolmogorov-Smirnov distance below its 0.1 % quantile."""
    values, root = sample(name), math.sqrt(COUNT)
    assert abs(values.mean()) < 4.5 / root
    assert abs(values.var() - 1) < 4.5 * math.sqrt(2) / root
    assert abs((values**3).mean()) < 4.5 * math.sqrt(15) / root
    assert abs((values**4).mean() - 3) < 4.5 * math.sqrt(96) / root
    grid = np.linspace(-5, 5, 1001)
    empirical = np.searchsorted(np.sort(values), grid) / COUNT
    assert np.abs(empirical - [NormalDist().cdf(x) for x in grid]).max() < 1.95 / root


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096])
def test_neighbours_are_not_correlated(lag: int) -> None:
    """Neither they nor their squares: a pair of them would share a radius."""
    values = sample("w")
    one, other = values[:-lag], values[lag:]
    assert abs((one * other).mean()) < 4.5 / math.sqrt(COUNT)
    assert abs(((one**2 - 1) * (other**2 - 1)).mean()) < 9 / math.sqrt(COUNT)


def test_parameters_and_seeds_are_not_correlated() -> None:
    placement = ParamPlacement((COUNT,), normal(1.0))
    samples = [drawn(placement, name, seed).double() for name, seed in (("a", 1), ("b", 1), ("a", 2))]
    for index, one in enumerate(samples):
        for other in samples[:index]:
            assert abs((one * other).mean().item()) < 4.5 / math.sqrt(COUNT)


def test_mean_and_standard_deviation_are_those_of_the_distribution() -> None:
    values = drawn(ParamPlacement((COUNT,), Init(3.0, 0.5)))
    assert values.mean().item() == pytest.approx(3, abs=0.003)
    assert values.std().item() == pytest.approx(0.5, rel=0.005)
    assert drawn(ParamPlacement((3,), constant(0.25))).tolist() == [0.25] * 3


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_the_rounded_values_of_float32(dtype: torch.dtype) -> None:
    placement = ParamPlacement((50, 50), normal(0.02))
    assert torch.equal(drawn(placement, dtype=dtype), drawn(placement).to(dtype))


def test_main_parameters_have_the_values_that_are_computed_with() -> None:
    """Fully sharded parameters are float32 and computed with in bfloat16."""
    parameter = place(ParamPlacement((50, 50), normal(0.02)))
    set_compute_dtype(parameter, torch.bfloat16)
    draw(parameter, "w", 1)
    assert torch.equal(parameter, drawn(ParamPlacement((50, 50), normal(0.02))).bfloat16().float())


# -- memory that comes last


def test_materializing_gives_the_values_of_a_model_built_at_once() -> None:
    with deferred_memory():
        model = nn.ModuleDict({"a": ParallelLinear(8, 6, normal(0.1), bias=True)})
    assert all(parameter.is_meta for parameter in model.parameters())
    before = list(model.parameters())
    assert materialize(model, 1, CPU) == before
    assert list(map(id, model.parameters())) == list(map(id, before))
    expected = nn.ModuleDict({"a": ParallelLinear(8, 6, normal(0.1), bias=True)})
    initialize_parameters(expected, 1)
    assert torch.equal(model["a"].weight, expected["a"].weight)
    assert torch.equal(model["a"].bias, expected["a"].bias)
    assert materialize(model, 2, CPU) == []


def test_tied_parameters_stay_tied() -> None:
    with deferred_memory():
        model = nn.ModuleDict({"a": ParallelLinear(4, 4, normal(0.1)), "b": ParallelLinear(4, 4, normal(0.1))})
        model["b"].weight = model["a"].weight
    materialize(model, 1, CPU)
    assert model["b"].weight is model["a"].weight
    assert not model["a"].weight.is_meta


def test_a_users_own_values_are_kept() -> None:
    with deferred_memory():
        linear = place_replicated(nn.Linear(3, 2))
    before = linear.weight.detach().clone()
    assert materialize(linear, 1, CPU) == []
    initialize_parameters(linear, 1)
    assert torch.equal(linear.weight, before)


def test_a_users_model_on_the_meta_device_is_refused() -> None:
    linear = place_replicated(nn.Linear(3, 2, device="meta"))
    with pytest.raises(UserError, match=r"'weight': is on the meta device and has no initial values"):
        materialize(linear, 1, CPU)


def test_of_a_model_that_is_loaded_only_the_padding_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with building(Sharding("mtp", GroupPosition(1, 2))), deferred_memory():
        model = nn.ModuleDict({"a": ParallelLinear(8, 4, normal(0.1)), "head": ParallelHead(8, 5, normal(0.1))})
    monkeypatch.setattr(torch, "empty_like", lambda x, **keywords: torch.full_like(x, torch.nan, **keywords))
    materialize(model, 1, CPU, draws=lambda name: False)
    assert model["a"].weight.isnan().all()
    assert model["head"].weight.isnan().any(1).tolist() == [True, True, False]
