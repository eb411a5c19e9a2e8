"""The ledger holds what the formula says: every call and every byte, and nothing else."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from internlm.config import Config, load_config
from internlm.core.context import global_context as gpc
from internlm.core.parallel.ledger import LEDGER, Traffic
from internlm.costs import Call, PassCalls, Symbols, attention, block, embedding, expected_traffic, head
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.ops.cross_entropy import IGNORED
from internlm.train import build_inventory, initialize_model_and_parallel_communicator, initialize_optimizer
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks
from tests.unit.data.files import write_bin

#: Overrides by the name of a case.
Table: TypeAlias = dict[str, tuple[str, ...]]

DOC = Path(__file__).parents[2] / "doc" / "traffic.md"


class Layout(NamedTuple):
    """Sizes of the parallel groups of a run."""

    mode: str
    tensor: int
    weight: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return math.lcm(self.tensor, self.weight) * self.data

    @property
    def overrides(self) -> tuple[str, ...]:
        sizes = f"parallel.tensor.size={self.tensor}", f"parallel.weight.size={self.weight}"
        heads = () if self.mode == "isp" else ("model.num_kv_attention_heads=4",)  # isp may have fewer than ranks
        return (f"parallel.tensor.mode={self.mode}", *sizes, *heads)


class Pipeline(NamedTuple):
    """Stages of equal layout."""

    stages: int
    layout: Layout

    @property
    def world(self) -> int:
        return self.stages * self.layout.world

    @property
    def overrides(self) -> tuple[str, ...]:
        sizes = f"parallel.pipeline.size={self.stages}", f"data.micro_num={self.stages}"
        return (*self.layout.overrides, *sizes, f"model.num_layers={2 * self.stages + 1}")  # parts of unequal size


SIZES = (1, 2, 4)
LAYOUTS = [
    *(Layout(mode, t, data=d) for mode in ("mtp", "msp", "fsp") for t in SIZES for d in (1, 2) if t * d <= 4),
    *(Layout("isp", t, w, d) for t in SIZES for w in SIZES for d in (1, 2) if math.lcm(t, w) * d <= 4),
    Layout("msp", 4, data=2),
    Layout("isp", 4, 2, 2),
]
#: Each mode on four ranks.
FEW = [Layout(mode, 2, data=2) for mode in ("mtp", "msp", "fsp")] + [Layout("isp", 4, 2)]

UNFUSED = ("model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False")
CASES: Table = {
    "half recomputed": ("model.checkpoint=0.5",),
    "all recomputed": ("model.checkpoint=True",),
    "embedding split by words": ("model.embed_split_hidden=False",),
    "tied embeddings": ("model.tie_word_embeddings=True",),
    "vocabulary of odd size": ("model.vocab_size=67", "model.embed_split_hidden=False"),
    "layer norm and biases": (
        "model.norm_type=layernorm",
        "model.qkv_bias=True",
        "model.o_bias=True",
        "model.mlp_bias=True",
    ),
    "decay of matrices alone": ("adam.decay_norm_and_bias=False", "model_type=INTERNLM"),
    "label smoothing": ("loss.label_smoothing=0.1",),
    # 20 000 words a rank let a chunk have 384 tokens.
    "two chunks of the loss": ("model.vocab_size=40000", "data.seq_len=112", "data.micro_bsz=4"),
    "unpacked": ("data.use_packed_dataset=False",),
    "windows across samples": ("data.pack_sample_into_one=True",),
    "no sharded state": ("parallel.zero1.size=1",),
    "float32": ("model.dtype=torch.float32",),
    "bfloat16": ("model.dtype=torch.bfloat16",),
    "two micro-batches": ("data.micro_num=2",),
    "heads wider than hidden": ("model.head_dim=16",),
    "norms of outputs and projections": ("model_type=OLMO2",),
    "projections recomputed": ("model_type=OLMO2", "model.checkpoint=0.5", "model.dtype=torch.bfloat16"),
    "projections, attention recomputed": ("model_type=OLMO2", "model.checkpoint=selective"),
    "norms at both ends and of heads": ("model_type=GEMMA3", "model.sliding_window=5", "model.global_layers=(0,)"),
    "unfused": (*UNFUSED, "model.qkv_bias=True", "model.checkpoint=0.5"),
    "normalised head": ("model_type=BAICHUAN2", "model.vocab_size=67"),
    "adapters": ("model.lora.rank=2",),
    "adapters of w13": ("model.lora.rank=2", 'model.lora.targets=["w13"]', "model.checkpoint=0.5", "model_type=OLMO2"),
    "wide residuals, post-norm": (
        "model.apply_post_layer_norm=True",
        "model.residual_in_fp32=True",
        "model.dtype=torch.bfloat16",
    ),
}

ISP_CASES: Table = {
    "one kv head": ("model.num_kv_attention_heads=1",),
    "multi-head": ("model.num_kv_attention_heads=4",),
    "adapters, overlap": ("model.lora.rank=2", 'model.lora.targets=["wo"]', "parallel.weight.overlap=True"),
    "unfused rows that are not divisible": (
        *(*UNFUSED, "model.multiple_of=1", "model.mlp_ratio=2.72", "model.num_kv_attention_heads=1"),
        *("parallel.weight.overlap=True", "model.checkpoint=0.5"),
    ),
    "rows that are not divisible": ("model.multiple_of=1", "model.mlp_ratio=2.72", "model.num_kv_attention_heads=1"),
    **{
        f"overlap, {per} before {place}, recompute {recompute}": (
            "parallel.weight.overlap=True",
            "parallel.weight.memory_pool=True",
            f"parallel.weight.forward_overlap_per={per}",
            f"parallel.weight.launch_allgather_before={place}",
            f"model.checkpoint={recompute}",
            "data.micro_num=2",
        )
        for per, place, recompute in [
            ("layer", "wqkv", 0.0),
            ("layer", "attn", 0.5),
            ("layer", "wo", 1.0),
            ("layer", "w1", 0.5),
            ("module", "wo", 0.5),
            ("module", "wo", 1.0),
        ]
    },
}

SCHEDULES: Table = {
    "GPipe": ("parallel.pipeline.mode=GPIPE",),
    "1F1B": (),
    "interleaved": ("model.num_chunks=2",),
    "ZB-H1": ("parallel.pipeline.mode=ZBH1",),
    "ZB-V": ("parallel.pipeline.mode=ZBV",),
}
PIPELINES = [
    *(Pipeline(p, Layout("mtp", 1)) for p in (2, 4)),
    *(Pipeline(2, Layout(mode, 2)) for mode in ("mtp", "msp", "fsp")),
    *(Pipeline(2, Layout("isp", t, w)) for t, w in ((1, 2), (2, 1), (2, 2))),
    Pipeline(2, Layout("mtp", 1, data=2)),
]
LARGE_PIPELINES = [Pipeline(4, Layout("msp", 2)), Pipeline(2, Layout("isp", 4, 2))]
LARGE_CASES: Table = {"tied, 1F1B": ("model.tie_word_embeddings=True",), "ZB-V": SCHEDULES["ZB-V"]}
PIPELINE_CASES: Table = {
    f"{schedule}, {name}": (*SCHEDULES[schedule], *case)
    for name, case in {
        "tied embeddings": ("model.tie_word_embeddings=True",),
        "half recomputed": ("model.checkpoint=0.5",),
        "layer norm, biases, bfloat16": (*CASES["layer norm and biases"], *CASES["bfloat16"]),
        "by parameters": ("parallel.pipeline.partition=parameters", "model.vocab_size=2048"),
        "OLMO2, wide residuals": ("model_type=OLMO2", "model.residual_in_fp32=True", "model.dtype=torch.bfloat16"),
        "adapters": ("model.lora.rank=2", "model.checkpoint=0.5"),
        "normalised head, tied": ("model_type=BAICHUAN2", "model.tie_word_embeddings=True"),
        "reduced early": ("hybrid_zero_optimizer.overlap_sync_grad=True", "parallel.zero1.size=1"),
    }.items()
    for schedule in ("interleaved", "ZB-V")
}
OVERLAP_CASES: Table = {
    f"{schedule}, {per} before {place}, recompute {recompute}": (
        *SCHEDULES[schedule],
        "parallel.weight.overlap=True",
        "parallel.weight.memory_pool=True",
        f"parallel.weight.forward_overlap_per={per}",
        f"parallel.weight.launch_allgather_before={place}",
        f"model.checkpoint={recompute}",
    )
    for schedule, per, place, recompute in [
        ("1F1B", "layer", "wqkv", 0.5),
        ("interleaved", "layer", "attn", 0.0),
        ("interleaved", "module", "wo", 0.5),
        ("ZB-H1", "module", "wo", 0.0),
        ("ZB-V", "layer", "wo", 0.5),
        ("ZB-V", "module", "wo", 1.0),
    ]
}


class Measured(NamedTuple):
    """Ledger of a rank after a training and after a validation step, and the valid labels of each micro-batch."""

    training: Traffic
    validation: Traffic
    training_tokens: list[int]
    validation_tokens: list[int]
    types: int


@functools.cache
def _measured(layout: Layout | Pipeline, cases: tuple[tuple[str, ...], ...]) -> dict[tuple[str, ...], list[Measured]]:
    """Measure all cases in one call, since process groups take longer to create than a step takes: by case and rank."""
    ranks = run_ranks(layout.world, _measure, [(*layout.overrides, *case) for case in cases])
    return {case: list(measured) for case, *measured in zip(cases, *ranks, strict=True)}


def _measure(rank: int, world_size: int, cases: Sequence[tuple[str, ...]]) -> list[Measured]:
    return [_measure_case(overrides) for overrides in cases]


def _measure_case(overrides: tuple[str, ...]) -> Measured:
    gpc.destroy()  # of the case before
    initialize_distributed_env(TINY, overrides=overrides)
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    loader, types = build_train_loader_with_data_type()
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(types))
    batches = iter(loader)
    start = LEDGER.snapshot()
    assert trainer.train_step(batches).update.updated
    training, trained = LEDGER.since(start), LEDGER.snapshot()
    trainer.execute_schedule(batches, forward_only=True)
    tokens = [[int((labels != IGNORED).sum()) for labels in loader.read(step)[1]] for step in range(2)]
    return Measured(training, LEDGER.since(trained), *tokens, len(types))


def _assert_formula_holds(
    layout: Layout | Pipeline, overrides: tuple[str, ...] = (), table: Table | None = None
) -> list[Measured]:
    """Compare every rank with the formula for ``overrides``, which run together with the rest of ``table``."""
    ranks = _measured(layout, tuple(table.values()) if table else (overrides,))[overrides]
    config = load_config(TINY, (*layout.overrides, *overrides), layout.world, "cpu")
    for index, rank in enumerate(ranks):
        stage = index * config.parallel.pipeline.size // layout.world
        inventory = build_inventory(config, layout.world, stage)
        expected = functools.partial(expected_traffic, inventory, types=rank.types)
        assert rank.training == expected(rank.training_tokens)
        assert rank.validation == expected(rank.validation_tokens, forward_only=True)
    return ranks


def _wide(value: Layout | Pipeline) -> object:
    return pytest.param(value, marks=pytest.mark.wide)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout: Layout) -> None:
    _assert_formula_holds(layout)


#: All cases of a layout run together, so that one layout costs as much as its cases. fsp sends what msp does and more;
#: test_parallel.py compares the traffic of most cases under mtp.
NARROW = Layout("fsp", 2), Layout("isp", 4, 2)
EVERY_CASE = [*NARROW, *(_wide(layout) for layout in FEW if layout not in NARROW)]


@pytest.mark.parametrize("layout", EVERY_CASE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str, layout: Layout) -> None:
    _assert_formula_holds(layout, CASES[case], CASES)


@pytest.mark.parametrize("layout", [Layout("isp", 4, 2), _wide(Layout("isp", 1, 4))], ids=str)
@pytest.mark.parametrize("case", ISP_CASES)
def test_every_case_of_isp(case: str, layout: Layout) -> None:
    _assert_formula_holds(layout, ISP_CASES[case], ISP_CASES)


@pytest.mark.parametrize("layout", [Layout("mtp", 1, data=4), Layout("isp", 2, 1, 2)], ids=str)
def test_state_shared_by_part_of_the_ranks(layout: Layout) -> None:
    """The zero group has two ranks: two shards, and two replicas of each."""
    _assert_formula_holds(layout, ("parallel.zero1.size=2",))


def test_padding_of_weights_in_flat_buffers() -> None:
    """Four ranks divide neither the 174 rows of w13 nor the 65 of the vocabulary, and rows are wider than the
    padding of flat buffers, so padded rows show in the traffic."""
    sizes = "model.hidden_size=256", "model.multiple_of=1", "model.mlp_ratio=0.34", "model.vocab_size=65"
    _assert_formula_holds(Layout("isp", 1, 4, 2), sizes)


#: What these add to a pipeline alone and to the other layouts is left to the widest sweep.
WIDE = (
    *(Pipeline(2, Layout(mode, 2)) for mode in ("mtp", "msp")),
    *(Pipeline(2, Layout("isp", *sizes)) for sizes in ((1, 2), (2, 1), (4, 2))),
)


@pytest.mark.parametrize("pipeline", [_wide(p) if p in WIDE else p for p in PIPELINES], ids=str)
def test_every_schedule(pipeline: Pipeline) -> None:
    for case in SCHEDULES.values():
        _assert_formula_holds(pipeline, case, SCHEDULES)


@pytest.mark.parametrize("pipeline", [_wide(p) if p in WIDE else p for p in LARGE_PIPELINES], ids=str)
def test_large_pipelines(pipeline: Pipeline) -> None:
    for case in LARGE_CASES.values():
        _assert_formula_holds(pipeline, case, LARGE_CASES)


@pytest.mark.parametrize("layout", [Layout("mtp", 1), Layout("fsp", 2), _wide(Layout("isp", 1, 2))], ids=str)
def test_every_case_of_a_pipeline(layout: Layout) -> None:
    for case in PIPELINE_CASES.values():
        _assert_formula_holds(Pipeline(2, layout), case, PIPELINE_CASES)


def test_weights_fetched_ahead_in_every_schedule() -> None:
    """Every prefetched weight is used."""
    for case in OVERLAP_CASES.values():
        _assert_formula_holds(Pipeline(2, Layout("isp", 1, 2)), case, OVERLAP_CASES)


def test_several_chunks_without_a_pipeline() -> None:
    """Chunks on one rank pass hidden states in memory and send nothing."""
    for chunks in ("parallel.pipeline.mode=ZBV", "model.num_chunks=3"):
        ranks = _assert_formula_holds(Pipeline(1, Layout("fsp", 2)), (chunks,))
        assert all(collective != "send" for rank in ranks for _, collective in rank.training)


@pytest.mark.parametrize("layout", [*FEW, Pipeline(2, Layout("mtp", 1)), Pipeline(2, Layout("msp", 2))], ids=str)
def test_ignored_labels(tmp_path: Path, layout: Layout | Pipeline) -> None:
    """Two dataset types; two of three samples have no valid label, so that some micro-batches have no loss."""
    for name, offset in (("cn", 0), ("en", 7)):
        samples = [[(offset + i * j) % 63 + 1 for j in range(4 + i % 12)] for i in range(24)]
        write_bin(tmp_path / name / "a.bin", [[-t for t in s] if i % 3 else s for i, s in enumerate(samples)])
    data = (f"train_folder={tmp_path}", "use_packed_dataset=False", "micro_bsz=1", "micro_num=2")
    ranks = _assert_formula_holds(layout, tuple(f"data.{given}" for given in data))
    assert ranks[0].types == 2
    assert any(0 in rank.training_tokens for rank in ranks)


# -- the closed forms of doc/traffic.md, by hand
def _seven_b(mode: str, recompute: bool = False) -> Config:
    """Return a config of 32 layers, hidden size 4096, 32 heads and 4096 tokens in bfloat16 on 8 ranks."""
    model = dict(num_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=32000, checkpoint=recompute)
    tensor, weight = dict(size=8, mode=mode), dict(size=8 if mode == "isp" else 1)
    return load_config(
        dict(
            model_type="LLAMA2",
            model=dict(**model, dtype="torch.bfloat16"),
            data=dict(seq_len=4096, micro_bsz=1, total_steps=1),
            adam=dict(lr=1e-4),
            parallel=dict(tensor=tensor, weight=weight),
        ),
        world_size=8,
        device_type="cuda",
    )


def _step_of_seven_b(mode: str, recompute: bool) -> Traffic:
    return expected_traffic(build_inventory(_seven_b(mode, recompute), 8), device_type="cuda")


def _sent(calls: list[Call]) -> int:
    return sum(call.sent for call in calls)


ACTIVATION = 4096 * 4096 * 2 * 7 // 8  # an all-gather of T·H: what arrives from the 7 other ranks, 29 360 128 bytes
LAYER = (3 * 4096 * 4096 + 4096 * 4096 + 3 * 4096 * 11008) * 2 * 7 // 8  # all weights of a layer but this rank's


@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [
        ("mtp", 4 * ACTIVATION, 4 * ACTIVATION),
        ("msp", 4 * ACTIVATION, 4 * ACTIVATION),
        ("fsp", 4 * ACTIVATION, 6 * ACTIVATION),
        ("isp", LAYER + 4 * ACTIVATION // 8, 2 * LAYER + 4 * ACTIVATION // 8),
    ],
)
def test_bytes_of_a_layer_by_hand(mode: str, forward: int, backward: int) -> None:
    layer = block(Symbols.of(_seven_b(mode), 8), 0)
    assert (_sent(layer.forward), _sent(layer.backward)) == (forward, backward)


def test_recomputed_blocks_run_forward_once_more() -> None:
    for mode in ("mtp", "msp", "fsp", "isp"):
        plain, again = (
            sum(entry.sent for entry in _step_of_seven_b(mode, recompute).values()) for recompute in (False, True)
        )
        assert again - plain == 32 * _sent(block(Symbols.of(_seven_b(mode), 8), 0).forward)


def test_only_isp_exchanges_heads_and_gathers_embedding_and_head() -> None:
    assert attention(Symbols.of(_seven_b("mtp"), 8)) == PassCalls([], [])
    for layer in (embedding, head):
        forward, backward = layer(Symbols.of(_seven_b("isp"), 8))
        assert _sent(forward) == _sent(backward) == 32000 * 4096 * 2 * 7 // 8


def test_the_numbers_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The program on the page prints the tables on the page."""
    page = DOC.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program, {})
    assert all(table in page for table in capsys.readouterr().out.strip().split("\n\n"))
