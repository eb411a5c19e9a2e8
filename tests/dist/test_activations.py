"""What autograd saves in a forward pass is what the formula says, part by part and to the byte."""

from __future__ import annotations

import functools
import gc
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from internlm.config import Config, load_config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel import placement_of
from internlm.core.parallel.attach import attach_communicators
from internlm.core.parallel.block_forward import checkpoint_and_offload_blocks
from internlm.core.parallel.dropout import DropoutKey, dropout_key_scope
from internlm.core.parallel.offload import _SavedTensor, _Storage
from internlm.core.parallel.sharding import GroupPosition, Sharding
from internlm.costs.activations import (
    LOSS_INPUT,
    LOSS_LOGITS,
    LOSS_WEIGHT,
    MASK,
    NORM,
    RECOMPUTED,
    ROTARY,
    TOKEN_IDS,
    rotary,
    saved_for_backward,
    saved_on_host,
)
from internlm.costs.block_activations import (
    ADAPTERS,
    GATE_UP,
    GATHERED,
    HEADS,
    KERNEL,
    MASKS,
    NORMS,
    QK_NORM,
    QKV,
    RESIDUAL,
)
from internlm.costs.stages import stage_layers_of
from internlm.costs.symbols import Symbols
from internlm.initialize import initialize_distributed_env
from internlm.train.build_model import build_model
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

DOC = Path(__file__).parents[2] / "doc" / "activations.md"

#: 256 tokens, so that even a quarter of them is a multiple of the rows to which products are padded on the CPU.
SMALL: dict[str, Any] = TINY | {
    "data": TINY["data"] | {"seq_len": 64, "micro_bsz": 4},
    "model": TINY["model"] | {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 96},
}

Case: TypeAlias = tuple[str, ...]

#: The module in whose forward each part is saved; that of both columns is one, loss and masks are the model's own.
SAVED_BY = {
    TOKEN_IDS: "embedding",
    MASK: "",
    MASKS: "block",
    ROTARY: "attention",
    RESIDUAL: "columns",
    GATHERED: "columns",
    NORMS: "norms",
    QK_NORM: "qk_norm",
    QKV: "attention",
    HEADS: "wo",
    KERNEL: "attention",
    GATE_UP: "w2",
    ADAPTERS: "lora_b",
    RECOMPUTED: "block",
    NORM: "norm",
    LOSS_INPUT: "",
    LOSS_WEIGHT: "",
    LOSS_LOGITS: "",
}


class Layout(NamedTuple):
    """Sizes of a run."""

    mode: str
    tensor: int
    weight: int = 1

    @property
    def world(self) -> int:
        return math.lcm(self.tensor, self.weight)

    @property
    def overrides(self) -> tuple[str, ...]:
        sizes = f"parallel.tensor.size={self.tensor}", f"parallel.weight.size={self.weight}"
        return (f"parallel.tensor.mode={self.mode}", *sizes, GROUPED)


LAYOUTS = [
    *(Layout(mode, t) for mode in ("mtp", "msp", "fsp") for t in (1, 2, 4)),
    *(Layout("isp", t, w) for t in (1, 2, 4) for w in (1, 2)),
]

#: Layers that are recomputed where half of so many are.
HALF_OF = {3: [0], 6: [0, 2, 4]}
ALL, SELECTIVE = "model.checkpoint=1.0", "model.checkpoint=selective"
DROPOUT, KEPT = "model.drop_rate=0.25", "model.dropout_selective_checkpoint=False"
GROUPED = "model.num_kv_attention_heads=4"
HALF = "model.dtype=torch.bfloat16", "model.attention_backend=sdpa"
WIDE_RESIDUALS = (*HALF, "model.residual_in_fp32=True")
UNFUSED = "model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False", GROUPED
POST_NORM = "model.apply_post_layer_norm=True"
#: Windows of 24 of 64 tokens, in all layers but one.
GEMMA3 = "model_type=GEMMA3", "model.sliding_window=24", "model.global_layers=(1,)", GROUPED
ADAPTED = "model.lora.rank=4"
OF_ROWS, OF_W13 = 'model.lora.targets=["wo", "w2"]', 'model.lora.targets=["w13"]'
#: Recompute × heads × dtype, and what else the formula knows of.
CASES = [
    *(
        (f"model.checkpoint={recompute}", heads, f"model.dtype=torch.{dtype}")
        for recompute in (0.0, 0.5, 1.0)
        for heads in (GROUPED, "model.num_kv_attention_heads=8")
        for dtype in ("float32", "float64")
    ),
    (GROUPED, "model.vocab_size=97", "model.embed_split_hidden=False"),
    (GROUPED, "model.tie_word_embeddings=True"),
    (GROUPED, "model.norm_type=layernorm"),
    (GROUPED, "model.head_dim=16"),
    (GROUPED, "loss.label_smoothing=0.1"),  # some labels are ignored then
    (GROUPED, "model.attention_backend=sdpa", "model.dtype=torch.bfloat16"),
    (GROUPED, "model.use_flash_attn=False"),
    (SELECTIVE, GROUPED),
    (GROUPED, DROPOUT),
    (GROUPED, DROPOUT, KEPT),
    (GROUPED, "model.cpu_offloading=2"),
    ("model.checkpoint=0.5", GROUPED, DROPOUT, KEPT, "model.cpu_offloading=2"),
    (ALL, GROUPED, "model.cpu_offloading=1"),
    (SELECTIVE, DROPOUT, KEPT, "model.cpu_offloading=3"),
    ("model_type=OLMO2", GROUPED),
    ("model_type=OLMO2", GROUPED, DROPOUT, KEPT, "model.checkpoint=0.5", "model.cpu_offloading=2"),
    ("model_type=OLMO2", SELECTIVE, *WIDE_RESIDUALS),
    ("model_type=QWEN3", SELECTIVE, GROUPED),
    ("model_type=BAICHUAN2",),
    GEMMA3,
    (*GEMMA3, "model.checkpoint=0.5"),  # of the layers that aren't recomputed, only one with the base of all tokens
    (*GEMMA3, *WIDE_RESIDUALS, "model.cpu_offloading=1"),
    ("model_type=MISTRAL", "model.sliding_window=24", GROUPED, *HALF),
    (POST_NORM, "model.norm_type=layernorm", GROUPED),
    (POST_NORM, GROUPED, *WIDE_RESIDUALS),
    ("model.checkpoint=0.5", *WIDE_RESIDUALS),
    (GROUPED, ADAPTED),
    (ADAPTED, OF_ROWS, DROPOUT, KEPT, "model.checkpoint=0.5", "model.cpu_offloading=2"),
    ("model_type=OLMO2", ADAPTED, OF_W13, SELECTIVE),
    (*UNFUSED, "model_type=OLMO2", SELECTIVE, *HALF),
]
ISP_CASES = [(f"model.num_kv_attention_heads={kv}",) for kv in (1, 2)]  # fewer than ranks

#: Cuts of the model into parts, not all equally large.
CUTS: list[Case] = [
    ("parallel.pipeline.size=3", "model.num_layers=4", ALL),
    ("parallel.pipeline.size=2", "model.num_chunks=2", "model.num_layers=6", "model.checkpoint=0.5"),
    ("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "model.num_layers=5", "model.tie_word_embeddings=True"),
    ("parallel.pipeline.size=2", "model.num_layers=6", "model.checkpoint=0.5", DROPOUT, KEPT, "model.cpu_offloading=1"),
    ("parallel.pipeline.size=2", "model.num_layers=5", SELECTIVE, "model.cpu_offloading=2"),
    ("parallel.pipeline.size=2", "model.num_layers=6", "model.checkpoint=0.5", *GEMMA3),  # one table; both
    ("parallel.pipeline.size=2", "model.num_layers=3", "model.cpu_offloading=1", "model_type=OLMO2", *WIDE_RESIDUALS),
    ("parallel.pipeline.size=2", "model.num_layers=3", "model_type=OLMO2"),
    ("parallel.pipeline.size=2", "model.num_layers=3", ADAPTED, OF_ROWS),
]
CUT_LAYOUTS = [Layout("mtp", 1), *(Layout(mode, 2) for mode in ("mtp", "msp", "fsp")), Layout("isp", 2, 2)]


def cases_of(layout: Layout) -> list[tuple[str, ...]]:
    """Overrides of the cases that are run in a layout."""
    return CASES + (ISP_CASES if layout.mode == "isp" else [])


class Measured(NamedTuple):
    """Bytes on one rank after a forward pass."""

    saved: Counter[str]
    """By autograd, by the module that ran."""
    host: int
    """By what is to wait in host memory."""
    held: int
    """By whatever else came into being meanwhile and is still there."""
    tokens: int
    """That took part in the loss."""
    matrices: int
    """Of the parameters that are matrices."""


@functools.cache
def _measured(layout: Layout) -> dict[tuple[str, ...], list[Measured]]:
    """By case, rank by rank; all cases in one call, for the process groups take longer to make than a step."""
    cases = cases_of(layout)
    ranks = run_ranks(layout.world, _measure, layout.overrides, cases)
    return {case: list(measured) for case, *measured in zip(cases, *ranks, strict=True)}


def _measure(rank: int, world_size: int, layout: Sequence[str], cases: Sequence[tuple[str, ...]]) -> list[Measured]:
    initialize_distributed_env(SMALL, overrides=layout)
    gc.freeze()  # nothing older is looked at below
    measured = [_measure_case(load_config(SMALL, (*layout, *case), world_size, "cpu")) for case in cases]
    gc.unfreeze()
    return measured


def _measure_case(config: Config, stage: int = 0, chunk: int = 0) -> Measured:
    mode, tensor, weight = config.parallel.tensor.mode, gpc.group(ParallelMode.TENSOR), gpc.group(ParallelMode.WEIGHT)
    shares = GroupPosition(tensor.rank, tensor.size), GroupPosition(weight.rank, weight.size)
    part = stage_layers_of(config, stage)
    model = build_model(config, 0, sharding=Sharding(mode, *shares), stage_layers=part)
    attach_communicators(model, mode, tensor, weight)
    checkpoint_and_offload_blocks(model, config.model.recomputes, config.model.cpu_offloading)
    inputs = _inputs(config, shares[0] if mode == "isp" else GroupPosition())
    tokens = int((inputs["labels"] >= 0).sum())
    if not part.is_first(chunk):
        shape, dtype = model.hidden_like(inputs)
        inputs["hidden"] = torch.randn(shape, dtype=dtype).requires_grad_()
    matrices = sum(p.nbytes for name, p in model.named_parameters() if placement_of(p, name).is_matrix)
    inputs["chunk"] = chunk
    gc.collect()  # the model of the case before
    return Measured(*_forward(model, inputs), tokens, matrices)


def _loss_or_hidden(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.loss_sum


def _inputs(config: Config, part: GroupPosition) -> dict[str, Any]:
    """Of four sequences in one row this rank's part."""
    length, count = config.data.seq_len, config.data.micro_bsz
    ids = torch.randint(config.model.vocab_size, (length * count,), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1)
    if config.loss.label_smoothing:
        labels[length - 1 :: length] = -100
    whole = {"input_ids": ids, "labels": labels, "indexes": torch.arange(length).repeat(count)}
    own = {name: tensor.chunk(part.size)[part.rank].clone() for name, tensor in whole.items()}
    bounds = torch.arange(count + 1, dtype=torch.int32) * length
    return {**own, "cu_seqlens": bounds, "label_smoothing": config.loss.label_smoothing}


class Held:
    """A tensor, as long as autograd saves it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _forward(model: nn.Module, inputs: dict[str, Any]) -> tuple[Counter[str], int, int]:
    """What a forward pass saves, by module; what waits on the host; and what else is given up only with its graph."""
    parameters = {_at(parameter) for parameter in model.parameters()}
    saved: dict[int, tuple[str, int]] = {}
    running = _names_of_running(model)

    def pack(tensor: Tensor) -> Held:
        if _at(tensor) not in parameters:
            saved.setdefault(_at(tensor), (running[-1], tensor.untyped_storage().nbytes()))
        return Held(tensor.detach())  # what an operator gave would else keep itself

    with saved_tensors_hooks(pack, lambda held: held.tensor), dropout_key_scope(DropoutKey()):
        output = _loss_or_hidden(model, inputs)
    if "hidden" in inputs:  # it waits for its gradient, also where nobody saves it
        saved.setdefault(_at(inputs["hidden"]), ("columns", inputs["hidden"].nbytes))
    held = _storages()
    for _ in range(3):  # the backend may not yet have let go of what it sent
        dist.barrier()
        time.sleep(0.01)
        held = {at: size for at, size in _storages().items() if at in held}
    stores = [each for each in gc.get_objects() if type(each) is _Storage]
    parts = [part for each in stores for part in each.host]
    host = {_at(part) for part in parts}
    host_bytes = sum(part.nbytes for part in parts)
    others = {*saved, *host, _at(output)}
    del output, stores, parts
    _wait_for_the_graph_to_go()
    others |= _storages().keys()
    by_module: Counter[str] = Counter()
    for name, size in saved.values():
        by_module[name] += size
    return by_module, host_bytes, sum(size for at, size in held.items() if at not in others)


def _wait_for_the_graph_to_go() -> None:
    """The backend, which may be late, has had outputs of linears, and with them what came before."""
    for _ in range(1000):
        gc.collect()
        if not any(type(each) in (Held, _SavedTensor) for each in gc.get_objects()):
            return
        time.sleep(0.01)


def _storages() -> dict[int, int]:
    """Address and bytes of what the tensors that Python knows of hold."""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return {_at(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def _names_of_running(model: nn.Module) -> list[str]:
    """A list that holds, while ``model`` runs, the names of the modules that are in their forward, innermost last."""
    running: list[str] = []
    for path, module in model.named_modules():
        name = path.removesuffix(".lora_a").rpartition(".")[2]  # which has the input of the linear
        label = "columns" if name in ("wqkv", "w13") else "block" if name.isdigit() else name
        label = "norms" if name.endswith(("out_norm", "sum_norm")) else label
        module.register_forward_pre_hook(lambda *_, label=label: running.append(label))
        module.register_forward_hook(lambda *_: (running.pop(), None)[1])
    return running


def _at(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _expected(layout: Layout, case: Sequence[str], tokens: int | None = None) -> dict[str, int]:
    config = load_config(SMALL, (*layout.overrides, *case), layout.world, "cpu")
    return saved_for_backward(config, layout.world, tokens)


#: On four ranks, the one whose sizes differ; the others only in the widest sweep.
FOUR_RANKS = [Layout("isp", 4, 2)]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[pytest.mark.wide] if layout.world == 4 and layout not in FOUR_RANKS else [])
        for layout in LAYOUTS
    ],
    ids=str,
)
def test_every_part_to_the_byte(layout: Layout) -> None:
    for case, ranks in _measured(layout).items():
        config = load_config(SMALL, (*layout.overrides, *case), layout.world, "cpu")
        host = saved_on_host(config, layout.world)
        for rank in ranks:
            saved = saved_for_backward(config, layout.world, rank.tokens)
            _assert_measured(config, range(config.model.num_layers), saved, host, rank)


def _assert_measured(
    config: Config, layers: range, saved: dict[str, int], host: dict[str, int], measured: Measured
) -> None:
    """Autograd saves every part, and nothing else is held but what waits on the host, and each rotary table that no
    block saves: those that are recomputed or offloaded leave it to Python."""
    sizes = config.parallel.tensor.size, config.parallel.weight.size, config.parallel.pipeline.size
    s = Symbols.of(config, math.prod(sizes))
    table = saved[ROTARY] - rotary(s, _plain(config, layers))
    expected: Counter[str] = Counter()
    for part, size in saved.items():
        name = "wo" if part == QKV and config.model.checkpoint == "selective" else SAVED_BY[part]
        expected[name] += size - table if part == ROTARY else size
    assert measured.saved == expected, config.model
    assert (measured.host, measured.held) == (sum(host.values()), table), config.model


def _plain(config: Config, layers: range) -> list[int]:
    """Which of them are neither recomputed, not even in part, nor offloaded."""
    model = config.model
    if model.checkpoint in ("selective", True):
        return []
    again = HALF_OF[model.num_layers] if model.checkpoint else ()
    return [layer for layer in layers[model.cpu_offloading :] if layer not in again]


@pytest.mark.parametrize("t", [2, 4])
def test_modes_among_each_other(t: int) -> None:
    plain = "model.checkpoint=0.0", GROUPED
    mtp, msp, fsp, isp = (_expected(Layout(mode, t), plain) for mode in ("mtp", "msp", "fsp", "isp"))
    assert sum(fsp.values()) < sum(msp.values())
    assert msp[GATHERED] == t * msp[RESIDUAL]
    assert msp | {GATHERED: 0} == fsp
    for sequence_split in (msp, fsp, isp):
        for part in (RESIDUAL, NORM):
            assert sequence_split[part] * t == mtp[part]
    for part in (QKV, HEADS, GATE_UP):
        assert mtp[part] == msp[part] == fsp[part] == isp[part]


@pytest.mark.parametrize("t", [1, 2, pytest.param(4, marks=pytest.mark.wide)])
def test_half_of_the_matrices_under_isp(t: int) -> None:
    whole, half = _measured(Layout("isp", t)), _measured(Layout("isp", t, 2))
    for case in whole:
        if not {"model.vocab_size=97", ADAPTED} & {*case}:  # there the halves are padded, or adapters whole
            assert half[case][0].matrices * 2 == whole[case][0].matrices


# -- parts of a pipeline
def _measure_chunks(rank: int, world_size: int, layout: Sequence[str], cuts: Sequence[Case]) -> list[list[Measured]]:
    """Of every chunk of every stage; all in one process, for a chunk does not care where the others are."""
    initialize_distributed_env(SMALL, overrides=layout)
    gc.freeze()
    configs = [_cut_config(layout, cut, world_size) for cut in cuts]
    measured = [[_measure_case(config, *place) for place in _places(config)] for config in configs]
    gc.unfreeze()
    return measured


def _cut_config(layout: Sequence[str], cut: Case, stage_size: int) -> Config:
    stages = int(cut[0].partition("=")[2])
    return load_config(SMALL, (*layout, *cut, f"data.micro_num={stages}"), stages * stage_size, "cpu")


def _places(config: Config) -> list[tuple[int, int]]:
    """Every stage and chunk."""
    return list(product(range(config.parallel.pipeline.size), range(config.model.num_chunks)))


@pytest.mark.parametrize("layout", CUT_LAYOUTS, ids=str)
def test_every_chunk_to_the_byte(layout: Layout) -> None:
    """And nothing else is held, but for what is told above."""
    for rank in run_ranks(layout.world, _measure_chunks, layout.overrides, CUTS):
        for cut, measured in zip(CUTS, rank, strict=True):
            config = _cut_config(layout.overrides, cut, layout.world)
            for (stage, chunk), of_chunk in zip(_places(config), measured, strict=True):
                _assert_chunk(config, layout.world * config.parallel.pipeline.size, stage, chunk, of_chunk)


def _assert_chunk(config: Config, world: int, stage: int, chunk: int, measured: Measured) -> None:
    saved = saved_for_backward(config, world, stage=stage, chunk=chunk)
    host = saved_on_host(config, world, stage=stage, chunk=chunk)
    _assert_measured(config, stage_layers_of(config, stage).chunks[chunk], saved, host, measured)


# -- the page
def test_the_numbers_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The program on the page prints the tables on the page."""
    page = DOC.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program, {})
    assert all(table in page for table in capsys.readouterr().out.strip().split("\n\n"))
