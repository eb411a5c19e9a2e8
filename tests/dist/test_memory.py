"""Ranks hold what the memory plan says, row by row and to the byte."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from internlm.config import load_config
from internlm.config.schema import ModelConfig
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.fully_sharded import is_fully_sharded
from internlm.core.parallel.isp import IspEmbedding
from internlm.core.parallel.weight_gatherer import WeightGatherer
from internlm.core.trainer import Trainer
from internlm.costs import Plan, format_worst_plan, memory_plan
from internlm.costs.memory_plan import ACTIVATIONS, GATHER, REDUCTION
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.model.decoder import Decoder
from internlm.profiler.reports import held_between_steps
from internlm.solver.optimizer import HybridZeroOptimizer
from internlm.solver.optimizer.grad_reduce import BucketReduction
from internlm.train import build_inventory, initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.train.hooks import LogMemoryPlan
from internlm.train.hooks.log import own_plan
from internlm.train.inventory import plans_of_stages
from internlm.utils.logger import get_logger
from internlm.utils.registry import MODEL_INITIALIZER
from tests.dist.test_in_flight import Watch, address
from tests.dist.tiny import TINY, build_plain
from tests.harness.pool import run_ranks

Row: TypeAlias = tuple[int, tuple[str, ...]]

SMALL: dict[str, Any] = TINY | {
    "data": TINY["data"] | {"seq_len": 64, "micro_bsz": 4, "micro_num": 2},
    "model": TINY["model"] | {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 97},
}

ZERO, PARALLEL, WEIGHT = "hybrid_zero_optimizer", "parallel", "parallel.weight"
BF16 = "model.dtype=torch.bfloat16", "model.attention_backend=sdpa"
NARROW, FP32_NORM = f"{ZERO}.fp32_grad_accum=False", "use_fp32_norm=True"
REDUCED = "reduce_comm_dtype=torch.bfloat16"
BUCKETS = f"{ZERO}.reduce_bucket_size=20000"
WHOLE = f"{ZERO}.use_split_tensor_optim=False"
LAYERNORM = "model.norm_type=layernorm", "model_type=INTERNLM"
UNFUSED = "model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False"
TIED = "model.tie_word_embeddings=True"
OVERLAP, POOL = f"{WEIGHT}.overlap=True", f"{WEIGHT}.memory_pool=True"


def split_over(mode: str, tensor: int = 2, weight: int = 1) -> tuple[str, ...]:
    sizes = f"{PARALLEL}.tensor.size={tensor}", f"{WEIGHT}.size={weight}"
    return (f"{PARALLEL}.tensor.mode={mode}", *sizes)


def stages(mode: str = "1F1B") -> tuple[str, ...]:
    return f"{PARALLEL}.pipeline.size=2", f"{PARALLEL}.pipeline.mode={mode}", "data.micro_num=4"


def per_layer(module: str) -> tuple[str, ...]:
    return OVERLAP, f"{WEIGHT}.launch_allgather_before={module}"


PER_MODULE = OVERLAP, f"{WEIGHT}.forward_overlap_per=module"

#: Ranks and overrides.
ROWS: dict[str, Row] = {
    "zero over all, bf16, reduced in bf16": (4, (*BF16, REDUCED, BUCKETS)),
    "zero over two, narrow sums, norms in fp32": (4, (*BF16, NARROW, FP32_NORM, f"{PARALLEL}.zero1.size=2")),
    "zero off, narrow sums reduced in fp32": (
        2,
        (*BF16, NARROW, "reduce_comm_dtype=torch.float32", f"{PARALLEL}.zero1.size=1", "model.checkpoint=True"),
    ),
    "by parameter": (2, (*BF16, WHOLE, BUCKETS, REDUCED, "model.checkpoint=0.5")),
    "muon": (4, (*split_over("mtp"), *BF16, FP32_NORM, "optimizer.type=Muon", "model.checkpoint=selective")),
    "lion, embedding by entries": (
        2,
        (*split_over("msp"), "optimizer.type=Lion", "model.embed_split_hidden=False"),
    ),
    "fsp, offloaded": (4, (*split_over("fsp"), REDUCED, "model.cpu_offloading=2", *LAYERNORM)),
    "isp": (4, (*split_over("isp", 2, 2), *BF16, BUCKETS)),
    "isp, pool": (4, (*split_over("isp", 2, 4), POOL, "model.checkpoint=True")),
    "isp, by module, all recomputed": (2, (*split_over("isp", 2, 2), *PER_MODULE, "model.checkpoint=True")),
    "isp, by layer": (2, (*split_over("isp", 1, 2), *per_layer("wo"), TIED)),
    "isp, by layer from wqkv, pool, half recomputed": (
        2,
        (*split_over("isp", 2, 2), *per_layer("wqkv"), POOL, "model.checkpoint=0.5"),
    ),
    "isp, by layer from w1, unfused": (
        2,
        (*split_over("isp", 2, 2), *per_layer("w1"), POOL, *UNFUSED, "model.num_kv_attention_heads=2"),
    ),
    "isp, by layer from wo, unfused, half recomputed": (
        2,
        (*split_over("isp", 2, 2), *per_layer("wo"), *UNFUSED, "model.checkpoint=0.5"),
    ),
    "isp, by layer from attention, pipeline": (
        4,
        (*split_over("isp", 2, 2), *stages(), *per_layer("attn"), "model.num_layers=5"),
    ),
    "pipeline of tied ends": (4, (*stages("ZBV"), *BF16, TIED, "model.num_layers=5", "optimizer.type=Muon")),
    "fully sharded": (4, (f"{PARALLEL}.zero1.fsdp=True", f"{PARALLEL}.zero1.size=2", *BF16, REDUCED)),
}


class Peak:
    """Largest number of bytes that were held at once."""

    def __init__(self) -> None:
        self.bytes = 0

    def after(self, function: Callable[..., Any], held: Callable[[], int]) -> Callable[..., Any]:
        """Wrap ``function`` so that ``held`` is read after each call."""

        def watched(*arguments: Any) -> Any:
            result = function(*arguments)
            self.bytes = max(self.bytes, held())
            return result

        return watched


def _watch_gathering(model: Decoder, gatherer: WeightGatherer | None) -> Peak:
    peak = Peak()
    if gatherer is None:
        return peak

    def held() -> int:
        free = [buffer for buffers in gatherer.pool.values() for buffer in buffers]
        return sum(buffer.nbytes for buffer in (*gatherer._in_use.values(), *free))

    gatherer._prefetch = peak.after(gatherer._prefetch, held)
    embedding = getattr(model, "embedding", None)
    if embedding is not None and isinstance(embedding.communicator, IspEmbedding):
        table = embedding.weight.nbytes * gatherer.group.size
        embedding.communicator._gather = peak.after(embedding.communicator._gather, lambda: table + held())
    return peak


def _watch_reduction(optimizer: HybridZeroOptimizer) -> Peak:
    """Watch the tensors that are being reduced and are not views of the gradient buffers."""
    peak, reducer = Peak(), optimizer._reducer

    def held() -> int:
        begun = [each for each in getattr(reducer, "begun", ()) if isinstance(each, BucketReduction)]
        sent = [each._sent_shard.untyped_storage() for each in begun]
        buffers = {address(group.grads) for group in optimizer.groups}
        return sum({each.data_ptr(): each.nbytes() for each in sent if each.data_ptr() not in buffers}.values())

    reducer.begin = peak.after(reducer.begin, held)
    return peak


def _trainer(overrides: tuple[str, ...]) -> tuple[Trainer, WeightGatherer | None]:
    initialize_distributed_env(SMALL, overrides=overrides)
    model, gatherer = initialize_model_and_parallel_communicator(create_model())
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, gatherer)
    return initialize_trainer(model, optimizer, lr_schedule, beta2_schedule), gatherer


def _measure(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[int, int, Plan]:
    """Return stage, rank in the zero group, and bytes held in a step by row; without buffers that PyTorch allocates."""
    trainer, gatherer = _trainer(overrides)
    model, optimizer = trainer.model, trainer.optimizer
    assert isinstance(model, Decoder)
    gathering, reduction = _watch_gathering(model, gatherer), _watch_reduction(optimizer)
    batch, _ = next(iter(build_train_loader_with_data_type()[0]))
    ids = batch["input_ids"]
    watch = Watch(model, {address(ids)})
    trainer.scheduler.after_action = watch.measure
    gc.collect()
    gc.freeze()
    with saved_tensors_hooks(watch.pack, lambda saved: saved.tensor):
        trainer.execute_schedule(iter([(batch, ids.clone())]))  # every label counts
    gc.unfreeze()
    trainer.step()
    measured = held_between_steps(model, optimizer)
    measured[ACTIVATIONS] = max(watch.bytes)
    if not is_fully_sharded(model):
        measured |= {REDUCTION: reduction.bytes, GATHER: gathering.bytes}
    return gpc.get_local_rank(ParallelMode.PIPELINE), gpc.get_local_rank(ParallelMode.ZERO1), measured


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_held_to_the_byte(row: str) -> None:
    world, overrides = ROWS[row]
    config = load_config(SMALL, overrides, world, "cpu")
    for stage, zero_rank, measured in run_ranks(world, _measure, overrides):
        plan = memory_plan(build_inventory(config, world, stage), zero_rank=zero_rank)
        assert plan.keys() - measured.keys() == ({REDUCTION, GATHER} if config.parallel.zero1.fsdp else set())
        assert measured == {part: plan[part] for part in measured}


def _logged(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[str, Plan, Plan]:
    """Return the plan that the run logs, the plan of this rank, and what the rank holds between steps."""
    trainer, _ = _trainer(overrides)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = get_logger()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    LogMemoryPlan().before_run(trainer)
    log.removeHandler(handler)
    return "\n".join(lines), own_plan(trainer.model), held_between_steps(trainer.model, trainer.optimizer)


def test_a_run_logs_its_plan() -> None:
    overrides = ROWS["muon"][1]
    ranks = run_ranks(4, _logged, overrides)
    config = load_config(SMALL, overrides, 4, "cpu")
    plans = dict(enumerate(plans_of_stages(config, 4)))
    assert {text for text, *_ in ranks} == {format_worst_plan(plans)}
    inventory = build_inventory(config, 4)
    assert [plan for _, plan, _ in ranks] == [memory_plan(inventory, zero_rank=rank) for rank in (0, 0, 1, 1)]


def test_a_pipeline_logs_the_plan_of_its_fullest_stage() -> None:
    overrides = (*stages(), "model.num_layers=5")
    texts = {text for text, *_ in run_ranks(2, _logged, overrides)}
    plans = plans_of_stages(load_config(SMALL, overrides, 2, "cpu"), 2)
    assert texts == {format_worst_plan(dict(enumerate(plans)))}


FROZEN = "a user's model, frozen in part"


@MODEL_INITIALIZER.register_module(module_name=FROZEN)
def _build_frozen(model: ModelConfig) -> nn.Module:
    plain = build_plain(model)
    plain.head.requires_grad_(False)
    return plain


@pytest.mark.parametrize("model_type", ["PLAIN", FROZEN])
@pytest.mark.parametrize("overrides", [(), (f"{PARALLEL}.zero1.fsdp=True", *BF16), (*BF16, WHOLE)], ids=str)
def test_a_users_own_model_has_a_plan_but_for_its_activations(model_type: str, overrides: tuple[str, ...]) -> None:
    overrides = (f"model_type={model_type}", *overrides)
    inventory = build_inventory(load_config(SMALL, overrides, 2, "cpu"), 2)
    for rank, (text, plan, held) in enumerate(run_ranks(2, _logged, overrides)):
        assert text.endswith("which have no formula for this model")
        assert plan == memory_plan(inventory, zero_rank=rank)
        assert held == {row: plan[row] for row in held}
        assert plan.keys() - held.keys() == {REDUCTION}
