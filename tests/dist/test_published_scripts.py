"""Idioms of published training scripts, one by one, on one trainer after two steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from internlm.checkpoint import CheckpointManager
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer, TrainState
from internlm.data import build_train_loader_with_data_type
from internlm.data.loader import TrainLoader
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.solver.lr_schedules import Beta2Schedule, LRSchedule
from internlm.train import (
    get_train_data_loader,
    get_validation_data_loader,
    initialize_checkpoint_manager,
    initialize_model_and_parallel_communicator,
    initialize_optimizer,
)
from internlm.utils.errors import UserError
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

PUBLISHED = {
    **TINY,
    "VOCAB_SIZE": 64,
    "model": {**TINY["model"], "dtype": "torch.float16"},
    "adam": {"lr": 1e-2, "adam_beta1": 0.8},
    "lr_scheduler": {"warmup_ratio": 0.8, "total_steps": 5},
    "beta2_scheduler": {"init_beta2": 0.0, "c": 0.5},
    "grad_scaler": {"fp16": {"initial_scale": 8.0}},
    "optimizer": {"param_groups": ({"pattern": "embedding", "lr_scale": 0.5, "weight_decay": 0.0},)},
}


class Run(NamedTuple):
    """What the scripts have at hand, after two steps."""

    trainer: Trainer
    loader: TrainLoader
    lr_scheduler: LRSchedule
    beta2_scheduler: Beta2Schedule
    unpacked: tuple[Any, Any, Any]  # of the last execute_schedule
    update: tuple[bool, float]  # of the last step

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer

    @property
    def model(self) -> Any:
        return self.trainer.model


def _run() -> Run:
    initialize_distributed_env(PUBLISHED)
    model, isp_communicator = initialize_model_and_parallel_communicator(create_model())
    loader, _ = build_train_loader_with_data_type()
    optimizer, beta2_scheduler, lr_scheduler = initialize_optimizer(model, isp_communicator)
    trainer = initialize_trainer(model, optimizer, lr_scheduler, beta2_scheduler)
    assert (lr_scheduler.get_last_lr(), optimizer.param_groups[0]["betas"]) == ([1e-2 / 4], (0.8, 0.95))
    batches = iter(loader)
    for data in (next(batches), batches):  # a batch, or an iterator over batches
        trainer.zero_grad()
        result = trainer.execute_schedule(data, forward_only=False, return_loss=True, return_output_label=False)
        _, _, loss = result
        assert loss.item() == pytest.approx(result.loss, rel=1e-12)
        success, grad_norm = trainer.step()
    return Run(trainer, loader, lr_scheduler, beta2_scheduler, tuple(result), (success, grad_norm))


READS: dict[str, tuple[Callable[[Run], Any], Any]] = {
    "gpc.config['model']": (lambda r: gpc.config["model"]["hidden_size"], 32),
    "gpc.config.get": (lambda r: gpc.config.get("nothing", 3), 3),
    "gpc.config.VOCAB_SIZE": (lambda r: gpc.config.VOCAB_SIZE, 64),
    "gpc.config.data.gradient_accumulation": (lambda r: gpc.config.data.gradient_accumulation, 1),
    "gpc.config.parallel.sequence_parallel": (lambda r: gpc.config.parallel.get("sequence_parallel"), False),
    "optimizer.zero_grad(set_to_none=True)": (lambda r: r.optimizer.zero_grad(set_to_none=True), None),
    "in gpc.config.model": (lambda r: ("num_layers" in gpc.config.model, "x" in gpc.config.model), (True, False)),
    "gpc.get_world_size": (lambda r: gpc.get_world_size(ParallelMode.DATA), 1),
    "len(train_dl.dataset)": (lambda r: len(r.loader.dataset) > 0, True),
    "train_dl.collate_fn": (lambda r: r.loader.collate_fn([r.loader.dataset[0]])[1].shape, (1, 32)),
    "train_dl.batch_sampler": (lambda r: (len(r.loader.batch_sampler), r.loader.batch_sampler.batch_size), (5, 1)),
    "get_train_data_loader(num_worker=2)": (lambda r: get_train_data_loader(num_worker=2)[0].num_worker, 2),
    "get_validation_data_loader(num_worker=2)": (
        lambda r: {loader.num_worker for loader in get_validation_data_loader(num_worker=2).values()},
        {2},
    ),
    "lr_scheduler.get_last_lr()": (lambda r: r.lr_scheduler.get_last_lr(), [1e-2 * 2 / 4]),
    "beta2_scheduler.get_beta2()": (lambda r: r.beta2_scheduler.get_beta2(), 1 - 2**-0.5),
    "optimizer.param_groups[i]['lr']": (
        lambda r: sorted(group["lr"] for group in r.optimizer.param_groups),
        [1e-2 / 4, 1e-2 * 2 / 4],
    ),
    "optimizer.param_groups[i]['betas']": (
        lambda r: {group["betas"] for group in r.optimizer.param_groups},
        {(0.8, 1 - 2**-0.5)},
    ),
    "optimizer.param_groups[i].get": (
        lambda r: sorted(group.get("weight_decay", 1) for group in r.optimizer.param_groups),
        [0.0, 0.01],
    ),
    "optimizer.param_groups[i]['params']": (
        lambda r: {p for group in r.optimizer.param_groups for p in group["params"]} == set(r.model.parameters()),
        True,
    ),
    "optimizer.loss_scale": (
        lambda r: (type(r.optimizer.loss_scale), r.optimizer.loss_scale.item()),
        (torch.Tensor, 8.0),
    ),
    "trainer.engine": (
        lambda r: (r.trainer.engine.model is r.model, r.trainer.engine.optimizer is r.optimizer),
        (True, True),
    ),
    "trainer.schedule": (lambda r: r.trainer.schedule is r.trainer.scheduler, True),
    "train_state.batch_count": (lambda r: (r.trainer.state.batch_count, r.trainer.state.step_count), (2, 2)),
    "_, _, loss = execute_schedule": (lambda r: r.unpacked[:2], (None, None)),
    "loss.item()": (lambda r: (r.unpacked[2].shape, 4 < r.unpacked[2].item() < 4.4), ((), True)),
    "success, grad_norm = step": (lambda r: (r.update[0], r.update[1] > 0), (True, True)),
    "train_state.step_count += 1": (
        lambda r: _count(r.trainer.state),
        ({"step": 2, "num_consumed_tokens": 2 * 32, "inf_nan_skip_batches": 0}, 2, 4),
    ),
    "trainer, train_dl, _, lr_scheduler = initialize_trainer(train_dataloader=...)": (
        lambda r: (
            tuple(_trainer(r, train_dataloader=r.loader, scheduler_hooks=[]))[1:] == (r.loader, None, r.lr_scheduler)
        ),
        True,
    ),
    "hasattr(model, 'model')": (lambda r: hasattr(r.model, "model"), False),
}


def _assign(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


REPLACED: dict[str, tuple[Callable[[Run], Any], str]] = {
    "gpc.config.model.num_layers = 8": (
        lambda r: _assign(gpc.config.model, "num_layers", 8),
        r"^config key num_layers: cannot be set to 8, because a resolved config is frozen\. Set it in the config file",
    ),
    "gpc.config['x'] = 8": (lambda r: gpc.config.__setitem__("x", 8), "^config key x: cannot be set to 8"),
    "optimizer.backward(loss)": (
        lambda r: r.optimizer.backward(r.unpacked[2]),
        r"^HybridZeroOptimizer\.backward: does not exist in this project\. Use trainer\.execute_schedule",
    ),
    "model.model": (lambda r: r.model.model, r"^Decoder\.model: does not exist in this project\. Use the model itself"),
    "lr_scheduler.step()": (
        lambda r: r.lr_scheduler.step(),
        r"^LRSchedule\.step: does not exist in this project\. Remove the call: trainer\.step\(\) ",
    ),
    "beta2_scheduler.state_dict()": (lambda r: r.beta2_scheduler.state_dict(), r"^Beta2Schedule\.state_dict: does not"),
    "optimizer.param_groups[0]['lr'] = 1": (
        lambda r: r.optimizer.param_groups[0].__setitem__("lr", 1),
        r"^optimizer\.param_groups: lr: cannot be changed by a script\. .* as lr_scheduler to initialize_trainer$",
    ),
    "TrainState(gpc.config, batch_sampler)": (
        lambda r: TrainState(gpc.config, r.loader.batch_sampler),  # type: ignore[arg-type]
        r"^TrainState: expected a number of steps, got Config\. Use trainer\.state, which counts the steps",
    ),
    "engine, scheduler = initialize_trainer(...)": (
        lambda r: tuple(_trainer(r)),
        r"^initialize_trainer: returns one object, which does not unpack\. Write trainer = ",
    ),
    "initialize_trainer(scheduler_hooks=[hook])": (
        lambda r: _trainer(r, scheduler_hooks=[object()]),
        r"^initialize_trainer\(scheduler_hooks=\.\.\.\): does not exist in this version\. Remove it: trainer",
    ),
    "initialize_trainer(criterion=CrossEntropyLoss())": (
        lambda r: _trainer(r, criterion=torch.nn.CrossEntropyLoss()),
        r"^initialize_trainer\(criterion=\.\.\.\): expected a function of \(inputs, labels, grad_scale\), got Cross",
    ),
    "initialize_trainer(criterion=CrossEntropyLoss)": (
        lambda r: _trainer(r, criterion=torch.nn.CrossEntropyLoss),
        r"^initialize_trainer\(criterion=\.\.\.\): expected a function of .*, got the class CrossEntropyLoss\. Omit it",
    ),
    "initialize_trainer(criterion=max)": (
        lambda r: _trainer(r, criterion=max),
        r"^initialize_trainer\(criterion=\.\.\.\): expected a function of .*, got max\. Omit it",
    ),
    "initialize_trainer(lr_scheduler=lambda: 1)": (
        lambda r: initialize_trainer(r.model, r.optimizer, lambda: 1, r.beta2_scheduler),  # type: ignore[misc,arg-type]
        r"^initialize_trainer\(lr_scheduler=\.\.\.\): expected a function of the step, got <lambda>\(\)\. ",
    ),
    "initialize_trainer(model=None)": (
        lambda r: initialize_trainer(None, r.optimizer, r.lr_scheduler, r.beta2_scheduler),  # type: ignore[arg-type]
        r"^initialize_trainer\(model=\.\.\.\): expected one nn\.Module, got NoneType\. Pass the model that ",
    ),
    "initialize_trainer(model=[model])": (
        lambda r: initialize_trainer([r.model], r.optimizer, r.lr_scheduler, r.beta2_scheduler),  # type: ignore[arg-type]
        r"^initialize_trainer\(model=\.\.\.\): expected one nn\.Module, got list\. ",
    ),
    "initialize_trainer(types=0)": (
        lambda r: _trainer(r, types=0),
        r"^initialize_trainer\(types=\.\.\.\): expected a number of dataset types of at least 1, got 0\. Pass len",
    ),
    "initialize_trainer(types=['a'])": (
        lambda r: _trainer(r, types=["a"]),
        r"^initialize_trainer\(types=\.\.\.\): expected a number of dataset types of at least 1, got \['a'\]\. ",
    ),
    "initialize_trainer(data=...)": (
        lambda r: _trainer(r, data=r.loader),
        r"^initialize_trainer\(data=\.\.\.\): unknown keyword\. Call initialize_trainer\(model, opt",
    ),
    "initialize_trainer(model, optimizer)": (
        lambda r: initialize_trainer(r.model, r.optimizer),  # type: ignore[call-arg]
        r"^initialize_trainer: missing a required argument: 'lr_scheduler'\. Call initialize_trainer\(model, ",
    ),
    "initialize_trainer(model, optimizer, beta2_scheduler, lr_scheduler)": (
        lambda r: initialize_trainer(r.model, r.optimizer, r.beta2_scheduler, r.lr_scheduler),
        r"^initialize_trainer\(lr_scheduler=\.\.\.\): expected a function of the step, got Beta2Schedule\. ",
    ),
    "initialize_trainer(optimizer=AdamW(...))": (
        lambda r: initialize_trainer(
            r.model, torch.optim.AdamW(r.model.parameters()), r.lr_scheduler, r.beta2_scheduler
        ),  # type: ignore[arg-type]
        r"^initialize_trainer\(optimizer=\.\.\.\): expected the optimizer of initialize_optimizer, got AdamW\. Choose",
    ),
    "initialize_model_and_parallel_communicator([model])": (
        lambda r: initialize_model_and_parallel_communicator([r.model]),  # type: ignore[arg-type]
        r"^model: expected one nn\.Module, got list\. Pass what create_model returns",
    ),
    "get_train_data_loader(train_sampler=None)": (
        lambda r: get_train_data_loader(num_worker=0, train_sampler=None),  # type: ignore[call-arg]
        r"^get_train_data_loader: got an unexpected keyword argument 'train_sampler'\. Call get_train_data_load",
    ),
    "optimizer.step()": (
        lambda r: r.optimizer.step(),
        r"^HybridZeroOptimizer\.step: missing a required argument: 'lr'\. Call trainer\.step\(\), which passes ",
    ),
    "trainer.fit(batches)": (
        lambda r: r.trainer.fit(iter(r.loader), 2),  # type: ignore[arg-type]
        r"^trainer\.fit: expected a loader, got generator\. Pass that of build_train_loader_with_data_type; ",
    ),
    "initialize_checkpoint_manager(model, optimizer, iter(train_dl))": (
        lambda r: initialize_checkpoint_manager(r.model, r.optimizer, iter(r.loader)),  # type: ignore[arg-type]
        r"^initialize_checkpoint_manager\(train_dl=\.\.\.\): expected a training loader, got generator\. Pass the",
    ),
    "ckpt_manager.save(train_state) without a folder": (
        lambda r: initialize_checkpoint_manager(r.model, r.optimizer, r.loader).save(r.trainer.state),
        r"^ckpt\.save_ckpt_folder: names no folder to save to\. Set it in the config$",
    ),
    "gpc.get_world_size('data')": (
        lambda r: gpc.get_world_size("data"),  # type: ignore[arg-type]
        r"^global_context: expected a parallel mode, got 'data'\. Pass a ParallelMode, such as ParallelMode\.DATA$",
    ),
    "CheckpointManager(ckpt_config=...)": (
        lambda r: CheckpointManager(ckpt_config=gpc.config.ckpt, model=r.model),  # type: ignore[call-arg]
        r"^CheckpointManager: missing a required argument: 'config'\. Call internlm\.train\.initialize_checkpoint_",
    ),
    "train_dl.batch_sampler.state_dict()": (
        lambda r: r.loader.batch_sampler.state_dict(),
        r"^BatchSampler\.state_dict: does not exist in this project\. Use train_dl\.position\(step\)",
    ),
    "train_dl.batch_sampler.batch_count = 3": (
        lambda r: setattr(r.loader.batch_sampler, "batch_count", 3),
        r"^batch_sampler\.batch_count: cannot be set to 3, a view is read-only\. Remove the line: train_dl\.seek",
    ),
    "trainer.engine.backward(loss)": (
        lambda r: r.trainer.engine.backward(torch.ones(())),
        r"^Trainer\.backward: does not exist in this project\. Use trainer\.execute_schedule, which runs forward and",
    ),
    "execute_schedule(train_dl)": (
        lambda r: r.trainer.execute_schedule(r.loader),
        r"^trainer\.execute_schedule: expected a batch \(inputs, labels\) or an iterator .*, got TrainLoader\. Pass ",
    ),
    "execute_schedule(iter([]))": (
        lambda r: r.trainer.execute_schedule(iter([])),
        r"^trainer\.execute_schedule: the iterator has no more batches\. Pass a batch for each step; ",
    ),
    "trainer.train_step(iter([]))": (
        lambda r: r.trainer.train_step(iter([])),
        r"^trainer\.train_step: the iterator has no more batches\. Pass a batch for each step; ",
    ),
}


def _trainer(run: Run, **keywords: Any) -> Trainer:
    return initialize_trainer(
        run.model,
        run.optimizer,
        lr_scheduler=run.lr_scheduler,
        beta2_scheduler=run.beta2_scheduler,
        **keywords,
    )


def _count(state: TrainState) -> tuple[dict[str, int], int, int]:
    """Count as a script does, beside the trainer."""
    state.batch_count = 7
    state.step_count += 1
    state.inf_nan_skip_batches += 1
    state.num_consumed_tokens += 64
    state.num_consumed_samples_in_epoch += 4
    return state.state_dict(), state.step_count, state.num_consumed_samples_in_epoch


def _idioms(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    run = _run()
    found: dict[str, Any] = {}
    for idiom, (read, _) in READS.items():
        found[idiom] = read(run)
    messages = {}
    for idiom, (use, _) in REPLACED.items():
        with pytest.raises(UserError) as caught:
            use(run)
        messages[idiom] = str(caught.value)
    return found, messages


@pytest.fixture(scope="module")
def idioms() -> tuple[dict[str, Any], dict[str, str]]:
    return run_ranks(1, _idioms)[0]


@pytest.mark.parametrize("idiom", READS)
def test_an_idiom_reads(idiom: str, idioms: tuple[dict[str, Any], dict[str, str]]) -> None:
    expected = READS[idiom][1]
    assert idioms[0][idiom] == (pytest.approx(expected, rel=1e-12) if isinstance(expected, (float, list)) else expected)


@pytest.mark.parametrize("idiom", REPLACED)
def test_what_cannot_work_names_its_replacement(idiom: str, idioms: tuple[dict[str, Any], dict[str, str]]) -> None:

    assert re.search(REPLACED[idiom][1], idioms[1][idiom]), idioms[1][idiom]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config", lambda: ParallelContext().config),
        ("the group DATA", lambda: ParallelContext().get_world_size(ParallelMode.DATA)),
        ("the group DATA", lambda: ParallelContext().is_rank_for_log()),
        ("the group TENSOR", lambda: ParallelContext().tensor_parallel_size),
        ("the group ZERO1", lambda: ParallelContext().get_group(ParallelMode.ZERO1)),
    ],
)
def test_a_context_that_is_read_too_early_names_the_call_to_make(name: str, read: Callable[[], Any]) -> None:
    message = (
        rf"^global_context: {name} is not set before the process groups exist\. Call .*initialize_distributed_env f"
    )
    with pytest.raises(UserError, match=message):
        read()
