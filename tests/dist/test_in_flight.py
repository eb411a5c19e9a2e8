"""Stages of a pipeline keep after each action what the formula says, to the byte."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias
from weakref import WeakSet, ref

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from internlm.config import load_config
from internlm.core.context import global_context as gpc
from internlm.core.parallel.fully_sharded import local_shard
from internlm.core.scheduler.compute import InFlight
from internlm.core.scheduler.executor import ActionMarks
from internlm.costs.activations import kept_after_each_action, peak_saved, saved_for_backward
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.model.decoder import Decoder
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

Case: TypeAlias = tuple[str, ...]

STAGES = "parallel.pipeline.size=2", "data.micro_num=4", "model.num_layers=5", "model.num_kv_attention_heads=4"
DROPOUT = "model.drop_rate=0.25", "model.dropout_selective_checkpoint=False"
WIDE_RESIDUALS = "model.residual_in_fp32=True", "model.dtype=torch.bfloat16", "model.attention_backend=sdpa"
SCHEDULES: list[Case] = [
    ("parallel.pipeline.mode=GPIPE", "model.norm_type=layernorm"),
    ("data.micro_num=5", "model.checkpoint=0.5"),
    ("model.num_chunks=2", "model.tie_word_embeddings=True"),
    ("data.micro_num=5", "parallel.pipeline.mode=ZBH1", "model.checkpoint=0.5"),
    ("data.micro_num=5", "parallel.pipeline.mode=ZBV"),
    ("model.checkpoint=0.5", "model.cpu_offloading=1", *DROPOUT),
    ("data.micro_num=5", "parallel.pipeline.mode=ZBH1", "model.checkpoint=selective", *DROPOUT),
    ("parallel.pipeline.mode=ZBH1", "model.checkpoint=0.5", "model_type=OLMO2", *WIDE_RESIDUALS),
    ("parallel.pipeline.mode=ZBV", "model_type=GEMMA3", "model.sliding_window=5", "model.global_layers=(2,)"),
    ("parallel.pipeline.mode=ZBH1", "model_type=BAICHUAN2", "model.apply_post_layer_norm=True", *WIDE_RESIDUALS),
]
#: A tensor mode, ranks of the tensor group and of the weight group.
LAYOUTS = [
    ("mtp", 1, 1),
    *(pytest.param(*layout, marks=pytest.mark.wide) for layout in [("msp", 2, 1), ("fsp", 2, 1), ("isp", 2, 2)]),
]


class Saved:
    """Holder of a tensor that lives as long as autograd saves it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def address(tensor: Tensor) -> int:
    """Return the address of the storage of ``tensor``."""
    return tensor.untyped_storage().data_ptr()


def _tensors_of(kept: InFlight) -> Iterator[Tensor]:
    """Yield the tensors kept for a micro-batch besides those that autograd saves."""
    if kept.hidden is not None:
        yield kept.hidden
    for task in kept.tasks:
        assert isinstance(task, functools.partial)
        yield from (argument for argument in task.args if isinstance(argument, Tensor))


class Watch:
    """Measures the bytes of activations that are kept after each action."""

    def __init__(self, model: Decoder, shared: set[int]) -> None:
        self.model, self.shared = model, shared
        self.saved: WeakSet[Saved] = WeakSet()
        self.tables: list[ref[Tensor]] = []
        model._rotary = self._remembered(model._rotary)
        self.bytes: list[int] = []

    def pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        self.saved.add(saved)
        return saved

    def _remembered(self, rotary: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Wrap ``rotary`` to remember its tables: activation checkpointing, not autograd, may keep them."""

        def made(*arguments: object) -> tuple[Tensor, Tensor]:
            tables = rotary(*arguments)
            self.tables += map(ref, tables)
            return tables

        return made

    def measure(self, marks: ActionMarks) -> None:
        in_flight = [thing for thing in gc.get_objects() if type(thing) is InFlight]
        tensors = [tensor for kept in in_flight for tensor in _tensors_of(kept)] + [
            saved.tensor for saved in self.saved
        ]
        tensors += [table for table in (table() for table in self.tables) if table is not None]
        parameters = {address(local_shard(parameter).flat) for parameter in self.model.parameters()}
        kept = {}
        for tensor in tensors:
            if address(tensor) in self.shared:  # by all micro-batches: this one's part
                kept[tensor.data_ptr()] = tensor.nbytes
            elif address(tensor) not in parameters:
                kept[address(tensor)] = tensor.untyped_storage().nbytes()
        self.bytes.append(sum(kept.values()))


def _watch(rank: int, world_size: int, cases: Sequence[Case]) -> list[list[int]]:
    return [_watch_case(case) for case in cases]


def _watch_case(overrides: Case) -> list[int]:
    gpc.destroy()  # of the case before
    initialize_distributed_env(TINY, overrides=overrides)
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    assert isinstance(model, Decoder)
    loader, types = build_train_loader_with_data_type()
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule, types=len(types))
    batch, _ = next(iter(loader))
    ids = batch["input_ids"]
    watch = Watch(model, {address(ids)})
    trainer.scheduler.after_action = watch.measure
    gc.collect()
    gc.freeze()
    with saved_tensors_hooks(watch.pack, lambda saved: saved.tensor):
        trainer.execute_schedule(iter([(batch, ids.clone())]))  # every label counts
    gc.unfreeze()
    return watch.bytes


@pytest.mark.parametrize(("mode", "tensor", "weight"), LAYOUTS)
def test_a_stage_keeps_what_the_formula_says_after_each_action(mode: str, tensor: int, weight: int) -> None:
    sizes = f"parallel.tensor.size={tensor}", f"parallel.weight.size={weight}", f"parallel.tensor.mode={mode}"
    cases, world = [(*STAGES, *sizes, *schedule) for schedule in SCHEDULES], 2 * tensor
    for rank, of_rank in enumerate(run_ranks(world, _watch, cases)):
        for case, kept in zip(cases, of_rank, strict=True):
            config, stage = load_config(TINY, case, world, "cpu"), rank // tensor
            assert kept == kept_after_each_action(config, world, stage=stage), case
            assert max(kept) == peak_saved(config, world, stage=stage)


def test_peak_without_a_pipeline_is_one_micro_batch() -> None:
    config = load_config(TINY, ("data.micro_num=3",), 1, "cpu")
    assert peak_saved(config, 1) == sum(saved_for_backward(config, 1).values())
