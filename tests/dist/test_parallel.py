"""Tensor, sequence and weight parallelism change nothing: a run in any mode is that of one process, sums taken in
another order. The engine is that of ``internlm verify``, so what ranks hold in common is compared bit by bit besides,
outputs and gradients of modules are compared one by one, and what was sent is that of the formula."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.dist.oracle import verify
from tests.dist.tiny import DYNAMIC_NTK

MULTI_HEAD = "model.num_kv_attention_heads=4"
OVERLAP = ("parallel.weight.overlap=True",)

#: (mode, tensor size, weight size, ranks)
Layout = tuple[str, int, int, int]
TENSOR: list[Layout] = [
    (mode, tensor, 1, ranks) for mode in ("mtp", "msp", "fsp") for tensor, ranks in ((1, 2), (2, 2), (2, 4), (4, 4))
]
ISP: list[Layout] = [
    ("isp", tensor, weight, max(tensor, weight) * data)
    for tensor in (1, 2, 4)
    for weight in (1, 2, 4)
    for data in (1, 2)
    if 2 <= max(tensor, weight) * data <= 4
]
EIGHT: list[Layout] = [
    *(("mtp", size, 1, 8) for size in (2, 4)),
    *(("msp", size, 1, 8) for size in (2, 4)),
    *(("fsp", size, 1, 8) for size in (2, 4)),
    *(("isp", tensor, weight, 8) for tensor in (1, 2, 4) for weight in (1, 2, 4) if max(tensor, weight) == 4),
]

#: One layout of each mode for the cases, with data parallelism beside.
SAMPLES: list[Layout] = [("mtp", 2, 1, 4), ("msp", 2, 1, 4), ("fsp", 2, 1, 2), ("isp", 4, 2, 4)]

#: What hides mistakes, as overrides.
CASES: dict[str, tuple[str, ...]] = {
    "unpacked": ("data.use_packed_dataset=False",),
    "windows across samples": ("data.pack_sample_into_one=True",),
    "label smoothing": ("loss.label_smoothing=0.1",),
    "a vocabulary that no size divides": ("model.vocab_size=67", "loss.label_smoothing=0.1"),
    "an embedding split by words": ("model.embed_split_hidden=False", "model.vocab_size=67"),
    "tied embeddings": ("model.tie_word_embeddings=True", "model.vocab_size=67"),
    "scaled embedding gradient": ("model.embed_grad_scale=0.1",),
    "half recomputed": ("model.checkpoint=0.5",),
    "all recomputed, with biases": ("model.checkpoint=True", "model_type=INTERNLM"),
    "layer norm and biases": ("model.norm_type=layernorm", "model.qkv_bias=True", "model.mlp_bias=True"),
    "biases of rows": ("model.o_bias=True", "model.mlp_bias=True", "adam.decay_norm_and_bias=False"),
    "multi-head": (MULTI_HEAD,),
    "not clipped": ("hybrid_zero_optimizer.clip_grad_norm=0",),
    "optimizer state whole": ("parallel.zero1.size=1",),
    "a user's own model": ("model_type=PLAIN",),
    "means of micro-batches": ("loss.average=micro_batch",),
    "a rotary base for each document": DYNAMIC_NTK,
    "adapters": ("model.lora.rank=3", "model_type=INTERNLM"),
}


def overrides_of(layout: Layout) -> tuple[str, ...]:
    mode, tensor, weight, _ = layout
    return (f"parallel.tensor.mode={mode}", f"parallel.tensor.size={tensor}", f"parallel.weight.size={weight}")


def assert_equal(layout: Layout, case: tuple[str, ...] = (), dtype: str = "float64") -> None:
    if layout[0] != "isp" and layout[1] == 4:
        case = (*case, MULTI_HEAD)  # the tensor size must divide the kv heads
    overrides = (*overrides_of(layout), *case)
    report, _ = verify(layout[3], overrides, dtype=dtype)
    assert report.failures == []
    assert dtype != "float64" or (report.forward.first, report.backward.first) == (None, None)


#: Left to the widest sweep: they have no size that others have not.
WIDE: list[Layout] = [
    *((mode, tensor, 1, ranks) for mode in ("msp", "fsp") for tensor, ranks in ((1, 2), (2, 4))),
    *(("isp", *sizes, 4) for sizes in ((1, 2), (2, 1), (4, 2), (4, 4))),
]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[pytest.mark.wide] if each in WIDE else []) for each in (*TENSOR, *ISP)],
    ids=str,
)
def test_every_layout(layout: Layout) -> None:
    assert_equal(layout)


#: The others are those of four ranks with another size.
MOST_SPLIT: list[Layout] = [("mtp", 2, 1, 8), ("msp", 4, 1, 8), ("fsp", 2, 1, 8), ("isp", 2, 4, 8)]


@pytest.mark.parametrize(
    "layout",
    [*MOST_SPLIT, *(pytest.param(layout, marks=pytest.mark.wide) for layout in EIGHT if layout not in MOST_SPLIT)],
    ids=str,
)
def test_eight_ranks(layout: Layout) -> None:
    assert_equal(layout)


def _cases() -> Iterator[object]:
    for n, case in enumerate(CASES):
        yield case, SAMPLES[n % 3]
        yield pytest.param(case, SAMPLES[3], marks=[pytest.mark.wide] if n % 4 else [])


@pytest.mark.parametrize(("case", "layout"), list(_cases()), ids=str)
def test_every_case(case: str, layout: Layout) -> None:
    """With one mode in turn, and every fourth case with isp too; :func:`test_a_random_layout` tries them anywhere."""
    assert_equal(layout, CASES[case])


@pytest.mark.parametrize(("family", "layout"), [*zip(["INTERNLM2", "INTERNLM"] * 2, SAMPLES, strict=True)], ids=str)
def test_float32(family: str, layout: Layout) -> None:
    assert_equal(layout, (f"model_type={family}",), "float32")


def test_means_of_micro_batches_whose_rows_are_split() -> None:
    """Their valid tokens are counted over the ranks that share a row."""
    report, records = verify(4, (*overrides_of(SAMPLES[3]), "loss.average=micro_batch", "data.micro_num=3"))
    assert report.failures == []
    counts = [sum(row) for row in zip(*(record.tokens[0] for record in records), strict=True)]
    assert len(set(counts)) > 1
    assert any(len({record.tokens[0][row] for record in records}) > 1 for row in range(3))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("tensor", [2, 4])
def test_fewer_kv_heads_than_ranks(tensor: int, kv_heads: int) -> None:
    assert_equal(("isp", tensor, 2, 4), (f"model.num_kv_attention_heads={kv_heads}",))


@pytest.mark.parametrize(
    ("checkpoint", "per", "memory_pool"),
    [  # every pair of choices
        (checkpoint, per, (n + m) % 2 == 0)
        for n, checkpoint in enumerate([False, 0.5, True])
        for m, per in enumerate(["module", "layer"])
    ],
)
def test_isp_with_overlap(checkpoint: bool | float, per: str, memory_pool: bool) -> None:
    more = (*OVERLAP, f"parallel.weight.forward_overlap_per={per}", f"parallel.weight.memory_pool={memory_pool}")
    assert_equal(("isp", 2, 2, 4), (f"model.checkpoint={checkpoint}", *more))


def draws(count: int) -> Iterator[tuple[int, Layout, tuple[str, ...]]]:
    """Draw layouts and cases; each has a seed, by which :func:`test_a_random_layout` can draw it again."""
    for _ in range(count):
        seed = random.SystemRandom().randrange(10**6)
        yield draw(seed)


def draw(seed: int) -> tuple[int, Layout, tuple[str, ...]]:
    """The layout and the case of a seed."""
    rng = random.Random(seed)
    layout = rng.choice([*TENSOR, *ISP, *EIGHT])
    chosen = rng.sample(sorted(CASES), 2)
    more = (f"model.num_layers={rng.choice([1, 2, 3])}", f"data.seq_len={rng.choice([8, 24])}")
    if layout[0] == "isp" and rng.random() < 0.5:
        more = (*more, *OVERLAP)
    return seed, layout, tuple(dict.fromkeys((*CASES[chosen[0]], *CASES[chosen[1]], *more)))


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.wide)])
def test_a_random_layout(count: int) -> None:
    """Drawn anew in each run, from seeds that are printed. To try one again: ``draws = [draw(seed)]``."""
    for seed, layout, case in draws(count):
        print(f"seed {seed}: {layout} {case}")
        assert_equal(layout, case)
