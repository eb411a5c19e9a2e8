"""Memory plans computed by hand, and their text. tests/dist compares plans with running ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm.cli.main import main
from internlm.config import Config, load_config
from internlm.costs import format_plans, format_worst_plan, memory_plan
from internlm.costs.activations import peak_on_host, peak_saved, saved_on_host
from internlm.costs.device_buffers import NCCL_BYTES, communicators, gradients_of_block, logits_of_chunk
from internlm.costs.symbols import Symbols
from internlm.ops import linear_cross_entropy
from internlm.train.inventory import build_inventory, plans_of_stages

HIDDEN, VOCAB = 64, 128
#: wqkv, wo, w13, w2 of a block of one head, and its norms.
WEIGHTS = {"wqkv": 3 * HIDDEN * HIDDEN, "wo": HIDDEN * HIDDEN, "w13": 2 * 256 * HIDDEN, "w2": 256 * HIDDEN}
BLOCK, EMBEDDING = sum(WEIGHTS.values()) + 2 * HIDDEN, VOCAB * HIDDEN
SIZES = dict(num_layers=3, hidden_size=HIDDEN, num_attention_heads=1, vocab_size=VOCAB, dtype="torch.bfloat16")
KEYS: dict[str, Any] = dict(
    model_type="LLAMA2",
    model=SIZES | dict(mlp_ratio=4.0, multiple_of=64),
    data=dict(seq_len=16, micro_bsz=1, total_steps=1),
    adam=dict(lr=1e-4),
)
ALL = 3 * BLOCK + 2 * EMBEDDING + HIDDEN  # and the last norm; a multiple of the padding
MB, GB = 2**20, 2**30
HEADS = "model.num_attention_heads=2"


def resolved(*overrides: str, world: int = 1) -> Config:
    return load_config(KEYS, overrides, world, "cpu")


def plan(*overrides: str, world: int = 1, **where: Any) -> dict[str, int]:
    return memory_plan(build_inventory(resolved(*overrides, world=world), world), **where)


def test_one_rank_in_bfloat16() -> None:
    assert plan() == {
        "parameters": 2 * ALL,
        "gradients": 4 * ALL,
        "main parameters": 4 * ALL,
        "optimizer: exp_avg": 4 * ALL,
        "optimizer: exp_avg_sq": 4 * ALL,
        "reduction buffers": 0,
        "gather buffers": 0,
        "activations": peak_saved(resolved(), 1),
    }


def test_zero_shards_main_parameters_and_states() -> None:
    one, four = plan(), plan(world=4)
    for row, size in one.items():
        sharded = row.startswith(("main", "optimizer"))
        assert four[row] * (4 if sharded else 1) == pytest.approx(size, rel=1e-2), row  # padding


@pytest.mark.parametrize(
    ("overrides", "gradients", "reduction"),
    [
        (("hybrid_zero_optimizer.fp32_grad_accum=False",), 2 + 4, 0),
        (("reduce_comm_dtype=torch.bfloat16",), 4, 2),
        (("reduce_comm_dtype=torch.bfloat16", "hybrid_zero_optimizer.fp32_grad_accum=False"), 2 + 4, 0),
        (("reduce_comm_dtype=torch.float32", "hybrid_zero_optimizer.fp32_grad_accum=False"), 2 + 4, 4),
    ],
)
def test_gradients_and_reduction_buffers_follow_their_dtypes(
    overrides: tuple[str, ...], gradients: int, reduction: int
) -> None:
    found = plan(*overrides)
    assert (found["gradients"], found["reduction buffers"]) == (gradients * ALL, reduction * ALL)


def test_float32_needs_no_main_parameters() -> None:
    found = plan("model.dtype=torch.float32")
    assert (found["parameters"], found["main parameters"]) == (4 * ALL, 0)


def test_each_update_rule_has_the_states_that_it_keeps() -> None:
    assert "optimizer: exp_avg_sq" not in plan("optimizer.type=Lion")
    muon = plan("optimizer.type=Muon")
    assert muon["optimizer: momentum"] == 4 * 3 * sum(WEIGHTS.values())
    assert muon["optimizer: exp_avg"] == muon["optimizer: exp_avg_sq"] == 4 * ALL - muon["optimizer: momentum"]


def test_without_a_rank_the_plan_is_that_of_the_fullest_owner() -> None:
    whole = ("hybrid_zero_optimizer.use_split_tensor_optim=False",)
    ranks = [sum(plan(*whole, world=2, zero_rank=rank).values()) for rank in range(2)]
    assert ranks[0] != ranks[1]
    assert sum(plan(*whole, world=2).values()) == max(ranks)


OVERLAP = "parallel.weight.overlap=True"
QKV, WO, W13, W2 = WEIGHTS.values()


@pytest.mark.parametrize(
    ("overrides", "elements"),
    [
        ((), W13),
        (("parallel.weight.memory_pool=True",), QKV + WO + W13 + W2 + EMBEDDING + EMBEDDING),
        ((OVERLAP, "parallel.weight.forward_overlap_per=module"), W13 + W2),
        ((OVERLAP,), WO + W13 + W2 + QKV + WO + W13 + W2),
        ((OVERLAP, "parallel.weight.launch_allgather_before=w1"), W13 + W2 + QKV + WO + W13 + W2),
        ((OVERLAP, "parallel.weight.launch_allgather_before=w1", "model.num_layers=1"), W13 + W2),
        ((OVERLAP, "parallel.weight.forward_overlap_per=module", "model.checkpoint=True"), W2 + WO + W13),
        ((OVERLAP, "parallel.weight.memory_pool=True"), QKV + 2 * (WO + W13 + W2) + EMBEDDING + EMBEDDING),
    ],
)
def test_gather_buffers_hold_the_weights_that_overlap(overrides: tuple[str, ...], elements: int) -> None:
    isp = "parallel.tensor.mode=isp", "parallel.weight.size=2"
    assert plan(*isp, *overrides, world=2)["gather buffers"] == 2 * elements


def test_a_million_ranks_take_no_longer_than_the_few_that_differ() -> None:
    """A plan of each of them would take a minute, under fsdp several."""
    world = 1_000_000
    rows = 3 * (3 * HIDDEN + 256 + 2) + 2 * HIDDEN + 1  # the first rank has a row of each parameter
    assert plan("parallel.zero1.fsdp=True", world=world)["parameters"] == 4 * rows
    assert plan(world=world)["main parameters"] == 4 * 64  # the padding of a shard


def test_stages_have_plans_of_their_own() -> None:
    pipeline = resolved("parallel.pipeline.size=3", "data.micro_num=3", world=3)
    first, middle, last = plans_of_stages(pipeline, 3)
    assert [stage["parameters"] for stage in (first, middle, last)] == [
        2 * (BLOCK + EMBEDDING), 2 * BLOCK, 2 * (BLOCK + EMBEDDING + HIDDEN)
    ]  # fmt: skip
    assert first["activations"] > middle["activations"]


# -- on an accelerator


def test_an_accelerator_needs_the_logits_of_a_chunk_and_the_buffers_of_nccl() -> None:
    on_cpu, on_gpu = plan(world=4), plan(world=4, device_type="cuda")
    assert on_gpu.pop("transients") > 0
    # The loss saves its input and the gradient of the logits, which are smaller than the gradient of the weight.
    saved = on_cpu["activations"] - VOCAB * HIDDEN * 4 + 16 * (HIDDEN + VOCAB) * 2
    assert on_gpu == {**on_cpu, "activations": saved, "buffers of NCCL": NCCL_BYTES}


@pytest.mark.parametrize(
    ("overrides", "logits"),
    [
        ((), 16 * VOCAB * 4),
        (("model.dtype=torch.float16",), 16 * VOCAB * (2 + 4)),
        (("model.dtype=torch.float32",), 16 * VOCAB * 4),
        (("data.seq_len=4096",), 2048 * VOCAB * (2 + 4)),
        (("parallel.tensor.size=2", HEADS), 16 * VOCAB // 2 * 4),
        (("parallel.tensor.size=2", "parallel.tensor.mode=isp", HEADS), 8 * VOCAB * 4),
    ],
)
def test_a_chunk_of_logits_by_hand(overrides: tuple[str, ...], logits: int) -> None:
    assert logits_of_chunk(Symbols.of(resolved(*overrides, world=2), 2, device_type="cuda")) == logits


def test_only_the_stage_of_the_head_has_logits() -> None:
    pipeline = resolved("parallel.pipeline.size=3", "data.micro_num=3", world=3)
    stages = [Symbols.of(pipeline, 3, stage) for stage in range(3)]
    assert [logits_of_chunk(s) > 0 for s in stages] == [False, False, True]


ROW = 16 * HIDDEN * 2  # bytes of the hidden states of a row
GATE_UP = 2 * 16 * 256 * 2
SAVED = 2 * ROW + 3 * ROW + ROW + GATE_UP + 4 * 16  # inputs, q, k and v, attention's output and sums, gate and up


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        ((), 1, 2 * GATE_UP + ROW),
        (("model.checkpoint=True",), 1, 2 * GATE_UP + ROW + SAVED - ROW),
        (("model.checkpoint=selective",), 1, 2 * GATE_UP + ROW + ROW + 4 * 16),
        (("parallel.tensor.size=2", HEADS), 2, GATE_UP + ROW),
        (("parallel.tensor.size=2", "parallel.tensor.mode=msp", HEADS), 2, GATE_UP + ROW // 2 + ROW),
        (("parallel.tensor.size=2", "parallel.tensor.mode=isp", HEADS), 2, GATE_UP + ROW // 2),
    ],
)
def test_gradients_of_a_block_by_hand(overrides: tuple[str, ...], world: int, expected: int) -> None:
    config = load_config(KEYS, (*overrides, "model.attention_backend=varlen"), world, "cuda")
    assert gradients_of_block(Symbols.of(config, world), 0) == expected


def test_the_larger_transient_counts() -> None:
    sizes = (16, 1024, 4096)
    few, many, most = (plan(f"model.vocab_size={size}", device_type="cuda")["transients"] for size in sizes)
    s = Symbols.of(resolved("model.vocab_size=16"), 1)
    freed = 16 * (2 * HIDDEN + 4) + 16 * 2 * HIDDEN + 16 * 2 * (HIDDEN + 16)  # of the norm, and of the loss
    assert few == gradients_of_block(s, 0) - freed
    assert many == 16 * 1024 * 4  # logits
    saved = plan("model.vocab_size=4096", device_type="cuda")["activations"]
    assert most == 4096 * HIDDEN * 2 + ROW - saved  # gradients of the embedding and of its output


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        ((), 1, [0]),
        ((), 8, [1]),
        (("parallel.zero1.size=2",), 8, [3]),  # all ranks, those of a state, its replicas
        (("parallel.tensor.size=2", HEADS), 8, [3]),  # all, tensor, data
        (("parallel.pipeline.size=4", "data.micro_num=4", "model.num_layers=4"), 4, [3, 5, 5, 3]),  # all, and 2 a side
        (("parallel.tensor={'size': 2, 'mode': 'isp'}", "parallel.weight.size=2", HEADS), 8, [4]),  # and weights
    ],
)
def test_communicators_are_counted(overrides: tuple[str, ...], world: int, expected: list[int]) -> None:
    config = resolved(*overrides, world=world)
    assert [communicators(config, world, stage) for stage in range(len(expected))] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_on_a_device_needs_no_more_than_the_logits_of_a_chunk(dtype: torch.dtype) -> None:
    tokens, hidden, vocab = 3 * 2048, 16, 4096
    x = torch.empty(tokens, hidden, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(vocab, hidden, device="meta", dtype=dtype, requires_grad=True)
    labels = torch.empty(tokens, device="meta", dtype=torch.int64)
    with LiveBytes() as live:
        linear_cross_entropy(x, weight, labels)
    size = 2048 * vocab * (4 if dtype == torch.float32 else 2 + 4)
    kept = x.nbytes + 4 * weight.numel() + 5 * tokens  # gradients, losses and correct predictions
    assert 1 <= (live.peak - kept) / size < 1.01


class LiveBytes(TorchDispatchMode):
    """Within it, ``peak`` is the largest number of bytes in tensors that were made within it and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
        self.given: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage_of(tensor) for tensor in self.tensors.values()}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.given |= {storage_of(leaf) for leaf in leaves} - known
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and storage_of(leaf) not in self.given:
                self.tensors[id(leaf)] = leaf
        sizes = {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in self.tensors.values()}
        self.peak = max(self.peak, sum(sizes.values()))
        return out


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# -- as text


def test_a_table_has_a_column_for_each_stage() -> None:
    text = format_plans([{"a": MB, "activations": 0}, {"a": 3 * GB // 2, "activations": MB}], ["stage 0", "stage 1"])
    assert text.splitlines() == [
        "              stage 0   stage 1",
        "a             1.0 MiB  1.50 GiB",
        "activations         0   1.0 MiB",
        "total         1.0 MiB  1.50 GiB",
    ]


def test_the_total_is_set_against_the_memory_of_the_device() -> None:
    assert format_plans([{"activations": 3 * GB}], device_memory=80 * GB).splitlines()[1:] == [
        "total         3.00 GiB",
        "of 80.00 GiB      3.8%",
    ]


def test_the_fullest_stage_is_shown() -> None:
    (one,) = plans_of_stages(resolved(), 1)
    assert format_worst_plan({0: one}).startswith("Memory plan of the rank that holds the most\nparameters")
    plans = plans_of_stages(resolved("parallel.pipeline.size=3", "data.micro_num=3", world=3), 3)
    totals = [sum(plan.values()) for plan in plans]
    heading, *_ = format_worst_plan(dict(enumerate(plans))).splitlines()
    assert heading.endswith(f", in stage {totals.index(max(totals))}")


CONFIG = """
model_type = "LLAMA2"
model = dict(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=128)
data = dict(seq_len=64, micro_bsz=1, total_steps=1)
adam = dict(lr=1e-4)
"""


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    stages = "--set", "parallel.pipeline.size=2", "--set", "data.micro_num=2"
    main(["memory", str(file), "--world", "4", *stages])
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert heading == "Memory plan of the rank with the most memory in each stage, of 4 ranks"
    assert columns.split() == ["stage", "0", "stage", "1"]
    assert (rows[0].split()[0], rows[-1].split()[0]) == ("parameters", "total")
    with pytest.raises(SystemExit) as caught:
        main(["memory", str(file), "--world", "3", *stages])
    assert caught.value.code == 2


def test_offloaded_tensors_wait_on_the_host_for_all_micro_batches_in_flight() -> None:
    keys = "parallel.pipeline.size=3", "data.micro_num=4", "model.cpu_offloading=1"
    config = resolved(*keys, world=3)
    one = [sum(saved_on_host(config, 3, stage=stage).values()) for stage in range(3)]
    assert min(one) > 0
    # 1F1B: the first of three stages has three micro-batches in flight, the last has one.
    assert [peak_on_host(config, 3, stage=stage) for stage in range(3)] == [3 * one[0], 2 * one[1], one[2]]


def test_the_command_names_the_host_memory_of_offloading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    main(["memory", str(file), "--world", "1"])
    assert "host memory" not in capsys.readouterr().out
    main(["memory", str(file), "--world", "1", "--set", "model.cpu_offloading=1"])
    assert re.search(r"\nIn host memory, by offloading: \d.* [MG]iB\n$", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_experts=4", "model.num_experts: 4 is not available in this version. Use 1\n"),
        (
            "model_type=LAMA2",
            "model_type: no cost formula for 'LAMA2', which is not registered. Known: ",
        ),
        ("model.hidden_size=400000000", "hybrid_zero_optimizer.reduce_bucket_size: 536870912 splits "),
        ("model.hidden_size=1000000000000", "model.hidden_size: 1000000000000 makes a parameter with more bytes than "),
        (
            "model.num_layers=100000",
            "model.num_layers: 100000 is out of range. Set it to an integer of at least 1 and ",
        ),
        (
            "data.micro_num=1000001",
            "parallel.pipeline.size, model.num_chunks, data.micro_num: 1000001 pairs of virtual ",
        ),
    ],
)
def test_command_refuses_what_a_run_refuses(
    override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    with pytest.raises(SystemExit) as caught:
        main(["memory", str(file), "--world", "1", "--set", override])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(expected)
