from __future__ import annotations

import math
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch.autograd import gradcheck

from internlm.ops import PackedSequences, RotaryScaling, apply_rotary, reference, rotary_table, split_qkv_rotary
from tests.unit.ops.parity import assert_parity, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 7])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_equals_reference(dtype: torch.dtype, interleaved: bool) -> None:
    table = rotary_table(POSITIONS, 16, dtype=dtype)
    exact = tuple(t.double() for t in table)
    assert_parity(
        lambda x: apply_rotary(x, *table, interleaved),
        lambda x: reference.apply_rotary(x, *exact, interleaved),
        randn(7, 3, 16, dtype=dtype),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_group", [1, 4])
def test_split_equals_reference(per_group: int, dtype: torch.dtype, interleaved: bool) -> None:
    table = rotary_table(POSITIONS, 16, dtype=dtype)
    exact = tuple(t.double() for t in table)
    assert_parity(
        lambda qkv: split_qkv_rotary(qkv, *table, interleaved),
        lambda qkv: reference.split_qkv_rotary(qkv, *exact, interleaved),
        randn(7, 2, per_group + 2, 16, dtype=dtype),
    )


def test_tables_of_fp32_serve_half_precision() -> None:
    table = rotary_table(POSITIONS, 16)
    exact = tuple(t.double() for t in table)
    for interleaved in (False, True):
        assert_parity(
            lambda x, i=interleaved: apply_rotary(x, *table, i),
            lambda x, i=interleaved: reference.apply_rotary(x, *exact, i),
            randn(7, 3, 16, dtype=torch.bfloat16),
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    cos, sin = rotary_table(POSITIONS[:3], 4, dtype=torch.float64)
    assert gradcheck(partial(apply_rotary, cos=cos, sin=sin, interleaved=interleaved), (randn(3, 2, 4),))
    assert gradcheck(partial(split_qkv_rotary, cos=cos, sin=sin, interleaved=interleaved), (randn(3, 1, 4, 4),))


def test_results_are_stored_head_by_head() -> None:
    for x in split_qkv_rotary(randn(7, 2, 5, 16), *rotary_table(POSITIONS, 16, dtype=torch.float64), False):
        assert x.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = randn(1, 1, 32).expand(9, 1, 32), randn(1, 1, 32, seed=1).expand(9, 1, 32)

    def scores(first: int) -> torch.Tensor:
        table = rotary_table(torch.arange(first, first + 9), 32, dtype=torch.float64)
        return apply_rotary(q, *table, interleaved)[:, 0] @ apply_rotary(k, *table, interleaved)[:, 0].t()

    torch.testing.assert_close(scores(0), scores(1000))


def test_table_holds_the_angles() -> None:
    cos, sin = rotary_table(torch.tensor([0, 3]), 4, RotaryScaling(base=100.0), dtype=torch.float64)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_table_stays_exact_at_far_positions() -> None:
    cos, _ = rotary_table(torch.tensor([10**6 + 1]), 2)
    assert cos.item() == pytest.approx(math.cos(10**6 + 1), abs=1e-6)


def test_linear_scaling_divides_the_positions() -> None:
    torch.testing.assert_close(
        rotary_table(torch.tensor([8]), 8, RotaryScaling(factor=4.0)), rotary_table(torch.tensor([2]), 8)
    )


def test_dynamic_ntk_changes_nothing_up_to_the_longest_position() -> None:
    positions = torch.arange(16)
    scaled = rotary_table(positions, 8, RotaryScaling(factor=2.0, dynamic_ntk=True, max_position=16))
    torch.testing.assert_close(scaled, rotary_table(positions, 8))


def test_dynamic_ntk_grows_the_base_beyond() -> None:
    positions = torch.arange(64)
    scaled = rotary_table(positions, 8, RotaryScaling(factor=2.0, dynamic_ntk=True, max_position=16))
    torch.testing.assert_close(
        scaled, rotary_table(positions, 8, RotaryScaling(base=10000.0 * (2 * 64 / 16 - 1) ** (8 / 6)))
    )


def test_each_packed_sequence_has_the_dynamic_ntk_base_of_its_own_length() -> None:
    """Bit by bit as if it were alone, whatever lies beside it: shorter, as long, longer, and up to the limit."""
    scaling, lengths = RotaryScaling(factor=2.0, dynamic_ntk=True, max_position=16), [20, 64, 64, 3, 16, 20, 17]
    sequences = PackedSequences.from_cu_seqlens(torch.tensor([0, *accumulate(lengths)]))
    positions = torch.cat([torch.arange(length) for length in lengths])
    alone = [rotary_table(torch.arange(length), 8, scaling) for length in lengths]
    for packed, parts in zip(
        rotary_table(positions, 8, scaling, sequences.runs), zip(*alone, strict=True), strict=True
    ):
        assert torch.equal(packed, torch.cat(parts))
