from __future__ import annotations

from functools import partial
from importlib import import_module
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from internlm.accelerator import DeviceKind
from internlm.config.rules.model_rules import ATTENTION_NEEDS
from internlm.ops import PackedSequences, attention, reference, why_unavailable
from internlm.ops.attention import BACKENDS, FLASH_LIMITS, VARLEN_LIMITS, Limits, groups_heads
from internlm.utils.dtype import torch_dtype
from internlm.utils.errors import ConfigError
from tests.unit.ops.parity import LargestTensor, assert_parity, randn, relative_error, saved_for_backward

CPU_BACKENDS = ["blocked", "sdpa"]
LENGTHS = [
    [1],
    [5, 5, 7],
    [70, 130],  # more than one row block
    [3, 64, 64, 1],
]


def sequences_of(lengths: list[int]) -> PackedSequences:
    return PackedSequences.from_cu_seqlens(torch.tensor([0, *accumulate(lengths)]))


def inputs_of(
    lengths: list[int], heads: int, groups: int, dim: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(sum(lengths), n, dim, dtype=dtype, seed=i) for i, n in enumerate((heads, groups, groups)))


def assert_equals_reference(backend: str, lengths: list[int], *inputs: Tensor, **options: float | None) -> None:
    sequences = sequences_of(lengths)
    assert_parity(
        partial(attention, sequences=sequences, backend=backend, **options),
        partial(reference.attention, bounds=sequences.bounds, **options),
        *inputs,
    )


@pytest.fixture
def pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send short sequences the way of long ones."""
    monkeypatch.setattr("internlm.ops.cpu.blocked_attention._SINGLE_WORK", 0)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_reference(backend: str, lengths: list[int], groups: int, window: int | None) -> None:
    assert_equals_reference(backend, lengths, *inputs_of(lengths, 4, groups), window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    assert_equals_reference("auto", [70, 130], *inputs_of([70, 130], 4, 2, dtype=dtype))


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.usefixtures("pair_by_pair")
def test_long_segments_equal_reference(groups: int, window: int | None) -> None:
    lengths = [320, 200, 200]  # of these the last two are padded
    inputs = inputs_of(lengths, 4, groups, dim=64, dtype=torch.float32)
    assert_equals_reference("blocked", lengths, *inputs, window=window)


@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.usefixtures("pair_by_pair")
def test_memory_layout_does_not_matter(head_major: bool) -> None:
    inputs = inputs_of([300], 4, 2, dim=64, dtype=torch.float32)
    if head_major:
        inputs = tuple(x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs)
    assert_equals_reference("blocked", [300], *inputs)


@pytest.mark.parametrize("scores", [1, 64 * 40, 64 * 40 * 5])
def test_any_number_of_pairs_may_go_together(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.ops.cpu.blocked_attention._SCORES", scores)
    lengths = [40] * 5
    assert_equals_reference("blocked", lengths, *inputs_of(lengths, 6, 3))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 20))
def test_any_sequences(lengths: list[int], groups: int, window: int | None) -> None:
    assert_equals_reference("blocked", lengths, *inputs_of(lengths, 4, groups, dim=4), window=window)


def test_scale() -> None:
    assert_equals_reference("blocked", [6], *inputs_of([6], 2, 1), scale=0.9)
    assert_equals_reference("sdpa", [6], *inputs_of([6], 2, 1), scale=0.9)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradient(backend: str) -> None:
    sequences = sequences_of([3, 2])
    assert gradcheck(partial(attention, sequences=sequences, backend=backend), inputs_of([3, 2], 2, 1, dim=3))


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
def test_no_token_sees_another_segment_or_the_future(backend: str) -> None:
    lengths, sequences = [4, 6, 5], sequences_of([4, 6, 5])
    q, k, v = (x.detach() for x in inputs_of(lengths, 2, 1))
    before = attention(q, k, v, sequences, backend=backend)
    for x in (k, v):
        x[7] += 1.0  # the fourth token of the second sequence
    changed = (attention(q, k, v, sequences, backend=backend) != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [7, 8, 9]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_window_counts_the_token_itself(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs_of([5], 1, 1))
    out = attention(q, k, v, sequences_of([5]), window=1, backend=backend)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_memory_is_not_quadratic_in_the_total(backend: str, window: int | None) -> None:
    lengths = [64] * 16
    inputs = inputs_of(lengths, 1, 1, dim=2)
    with LargestTensor() as largest:
        attention(*inputs, sequences_of(lengths), backend=backend, window=window).sum().backward()
    assert largest.elements <= 64 * sum(lengths)


def test_blocked_saves_its_inputs_alone() -> None:
    inputs = inputs_of([20], 4, 2)
    with saved_for_backward() as saved:
        attention(*inputs, sequences_of([20]), backend="blocked")
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in inputs]


def test_auto_on_cpu_is_blocked_in_fp32_and_fused_in_half() -> None:
    for dtype, backend in ((torch.float32, "blocked"), (torch.float64, "blocked"), (torch.bfloat16, "sdpa")):
        inputs, sequences = inputs_of([70], 2, 1, dtype=dtype), sequences_of([70])
        assert torch.equal(attention(*inputs, sequences), attention(*inputs, sequences, backend=backend))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash", "'flash' expected tensors on a GPU, got cpu"),
        ("varlen", "'varlen' expected tensors on a GPU, got cpu"),
        ("spda", "'spda' is unknown, expected one of flash, varlen, blocked, sdpa, reference"),
    ],
)
def test_unavailable_backends_say_why(backend: str, reason: str) -> None:
    assert why_unavailable(backend, "cpu", torch.float32, 64) == reason
    with pytest.raises(ConfigError) as error:
        attention(*inputs_of([2], 1, 1), sequences_of([2]), backend=backend)
    assert reason in str(error.value)


def test_backends_of_half_precision_say_so() -> None:
    assert "torch.float16 or torch.bfloat16" in why_unavailable("varlen", "cuda", torch.float32, 64)
    assert "torch.float32 or torch.float64" in why_unavailable("blocked", "cpu", torch.bfloat16, 64)
    assert why_unavailable("reference", "cuda", torch.float32, 64) == ""


def test_the_config_refuses_the_kernels_that_cannot_serve() -> None:
    for backend, kernel in BACKENDS.items():
        on_host, dtypes = ATTENTION_NEEDS.get(backend, (False, ()))
        assert {torch_dtype(str(dtype)) for dtype in dtypes} == set(kernel.dtypes)
        assert kernel.on_host == (on_host if backend in ATTENTION_NEEDS else None)


@pytest.mark.parametrize(
    ("limits", "capability", "head_dim", "reason"),
    [
        (FLASH_LIMITS, (8, 0), 100, ""),
        (FLASH_LIMITS, (9, 0), 256, ""),
        (FLASH_LIMITS, (7, 5), 64, "needs a GPU of compute capability sm_80 or later, got sm_75"),
        (FLASH_LIMITS, (9, 0), 264, "expected a head dimension of at most 256, got 264"),
        (VARLEN_LIMITS, (10, 0), 128, ""),
        (VARLEN_LIMITS, (7, 0), 128, "needs a GPU of compute capability sm_80 or later, got sm_70"),
        (VARLEN_LIMITS, (8, 6), 100, "expected a head dimension divisible by 8, got 100"),
    ],
)
def test_flash_attention_has_limits(limits: Limits, capability: tuple[int, int], head_dim: int, reason: str) -> None:
    assert limits.why_exceeded(capability, head_dim) == reason


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "masked", "grouped"),
    [
        ((8, 0), torch.bfloat16, 64, False, True),
        ((8, 0), torch.bfloat16, 64, True, False),
        ((8, 0), torch.float32, 64, False, False),
        ((7, 5), torch.float16, 64, False, False),
        ((9, 0), torch.bfloat16, 512, False, False),
    ],
)
def test_grouped_queries_stay_grouped_only_where_a_fused_kernel_of_a_gpu_takes_them(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, masked: bool, grouped: bool
) -> None:
    assert groups_heads(capability, dtype, head_dim, masked) is grouped


@pytest.mark.parametrize("window", [None, 3])
def test_keys_and_values_that_are_expanded_for_a_gpu_give_the_same_attention(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, sequences = inputs_of([5, 5, 7], 4, 2), sequences_of([5, 5, 7])
    heads: list[list[int]] = []
    genuine = F.scaled_dot_product_attention

    def recording(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        heads.append([x.shape[1] for x in (q, k, v)])
        return genuine(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    monkeypatch.setattr(
        import_module("internlm.ops.attention"), "kind_of", lambda _: DeviceKind(name="gpu", backend="")
    )
    expanded = attention(*inputs, sequences, backend="sdpa", window=window)
    assert heads
    assert all(numbers == [4, 4, 4] for numbers in heads)
    assert relative_error(expanded, reference.attention(*inputs, sequences.bounds, window=window)) < 1e-12


def test_neighbours_of_equal_length_make_a_run() -> None:
    sequences = sequences_of([4, 4, 7, 4])
    assert sequences.runs == ((0, 2, 4), (8, 1, 7), (15, 1, 4))
    assert sequences.max_seqlen == 7
    assert sequences.tokens == 19
    assert sequences.bounds == [(0, 4), (4, 8), (8, 15), (15, 19)]
    assert sequences.cu_seqlens.dtype == torch.int32


def test_empty_segments_are_dropped() -> None:
    sequences = PackedSequences.from_cu_seqlens(torch.tensor([0, 0, 4, 4, 8, 8]))
    assert sequences.runs == ((0, 2, 4),)
    assert sequences.cu_seqlens.tolist() == [0, 4, 8]
    assert sequences.cu_seqlens.dtype == torch.int32


def test_uniform_sequences() -> None:
    uniform, general = PackedSequences.uniform(3, 5), sequences_of([5, 5, 5])
    assert uniform.runs == general.runs
    assert uniform.max_seqlen == general.max_seqlen
    assert torch.equal(uniform.cu_seqlens, general.cu_seqlens)
    assert uniform.cu_seqlens.dtype == general.cu_seqlens.dtype


def test_the_same_attention_twice_is_the_same_to_the_last_bit() -> None:
    inputs, sequences = inputs_of([300, 20], 4, 2, dim=64, dtype=torch.float32), sequences_of([300, 20])
    first, second = (attention(*inputs, sequences) for _ in range(2))
    assert torch.equal(first, second)
    grads = [torch.autograd.grad(out.sum(), inputs) for out in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_scores_far_apart() -> None:
    q, k, v = (x.detach() for x in inputs_of([70], 1, 1, dtype=torch.float32))
    sequences = sequences_of([70])
    exact = reference.attention(q.double() * 1e3, k.double(), v.double(), sequences.bounds)
    assert relative_error(attention(q * 1e3, k, v, sequences, backend="blocked"), exact) < 1e-4
