"""Gradients are reduced while others are computed, parameters gathered while layers run: and no bit differs for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm.config.schema import AdamConfig, HybridZeroConfig
from internlm.core.context.group import Group
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel import place_replicated
from internlm.core.parallel.block_forward import checkpoint_and_offload_blocks
from internlm.core.parallel.param_state import wait_for_all_gather
from internlm.solver.optimizer import HybridZeroOptimizer, ProcessGroups, grad_reduce, param_gather
from internlm.utils.errors import UserError
from internlm.verify.record import RankRecord
from tests.dist.oracle import plan_of, run
from tests.harness.pool import run_ranks
from tests.unit.model.samples import decoder, tokens

ZERO = "hybrid_zero_optimizer"
BOTH = (f"{ZERO}.overlap_sync_grad=True", f"{ZERO}.overlap_sync_param=True")
PATIENCE = 20.0  # seconds


# -- no bit differs


def _trained(ranks: int, overrides: tuple[str, ...]) -> list[RankRecord]:
    plan = plan_of(ranks, overrides, steps=5, dtype="float32")
    return run_ranks(ranks, run, plan.config, plan.seed, plan.steps)


#: Ranks, layout, and the kinds of shards (whole parameters or not) with which it is tried without ``--wide``.
UNCHANGED: list[tuple[int, tuple[str, ...], tuple[bool, ...]]] = [
    (2, (), (False, True)),
    (4, ("parallel.zero1.size=2", "model.tie_word_embeddings=True", "model.checkpoint=True"), (True,)),
    (4, ("parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.weight.overlap=True"), (False,)),
    (4, ("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBV", "model.num_layers=4", "data.micro_num=4"), (True,)),
]


@pytest.mark.parametrize(
    ("ranks", "layout", "whole"),
    [
        pytest.param(ranks, layout, whole, marks=[] if whole in narrow else [pytest.mark.wide])
        for ranks, layout, narrow in UNCHANGED
        for whole in (False, True)
    ],
    ids=str,
)
def test_no_bit_differs(ranks: int, layout: tuple[str, ...], whole: bool) -> None:
    common = (*layout, f"{ZERO}.reduce_bucket_size=3000", f"{ZERO}.use_split_tensor_optim={not whole}")
    for one, other in zip(_trained(ranks, common), _trained(ranks, (*common, *BOTH)), strict=True):
        assert one.losses == other.losses
        assert one.norms == other.norms
        for name, held in one.parameters.items():
            assert all(torch.equal(box, other.parameters[name].slices[where]) for where, box in held.slices.items()), (
                name
            )


# -- it really overlaps


class _Progress:
    """Counter of the modules that have run, on which a thread may wait."""

    def __init__(self) -> None:
        self.done = 0
        self._changed = threading.Condition()

    def advance(self, *_: Any) -> None:
        with self._changed:
            self.done += 1
            self._changed.notify_all()

    def reached(self, done: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.done >= done, PATIENCE)


@contextmanager
def _held_back(
    module: ModuleType, name: str, progress: _Progress, last: int
) -> Iterator[list[tuple[int, Future[bool]]]]:
    """No collective that ``module`` begins by that name is carried out before the model is further than when it was
    begun, or has made its ``last`` progress: to wait for it at once would last for ever. For each, when it was begun,
    and whether it could be carried out in time."""
    real, held, line = getattr(module, name), list[tuple[int, Future[bool]]](), ThreadPoolExecutor(max_workers=1)

    def carried_out(begun: int, args: Any) -> bool:
        moved = progress.reached(min(begun + 1, last))
        real(*args).wait()
        return moved

    def begin(*args: Any) -> SimpleNamespace:
        future = line.submit(carried_out, progress.done, args)
        held.append((progress.done, future))
        return SimpleNamespace(wait=future.result, release_if_completed=lambda: None)

    setattr(module, name, begin)
    try:
        yield held
    finally:
        setattr(module, name, real)
        line.shutdown()


def _model_and_optimizer(**options: Any) -> tuple[Any, HybridZeroOptimizer]:
    assert dist.group.WORLD is not None
    model = decoder(num_layers=3)
    groups = ProcessGroups(zero=Group.of(ParallelMode.ZERO1, dist.group.WORLD))
    return model, HybridZeroOptimizer(
        model, AdamConfig(lr=1e-2), HybridZeroConfig(reduce_bucket_size=4000, **options), groups
    )


def _step(model: Any, optimizer: HybridZeroOptimizer) -> None:
    optimizer.begin_step(micro_batches=1)
    model(tokens(1, 8), labels=tokens(1, 8, seed=1)).loss_sum.backward()
    optimizer.step(1e-2, 0.95)


def _grads(rank: int, world_size: int) -> list[tuple[int, bool]]:
    model, optimizer = _model_and_optimizer(overlap_sync_grad=True)
    _step(model, optimizer)  # learns
    progress = _Progress()

    def advance_in_backward(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(progress.advance)

    model.embedding.register_forward_hook(advance_in_backward)
    with _held_back(grad_reduce, "begin_reduce_scatter", progress, last=1) as held:
        _step(model, optimizer)
    return [(begun, future.result()) for begun, future in held]


def test_gradients_are_reduced_while_the_backward_pass_runs() -> None:
    """A reduction that was begun before the backward pass reached the embedding was still under way then."""
    for found in run_ranks(2, _grads):
        begun, timely = zip(*found, strict=True)
        assert all(timely)
        assert list(begun) == sorted(begun)
        assert begun.count(0) >= 3
        assert begun[-1] == 1  # the embedding's own gradients come last


def _gathers(rank: int, world_size: int) -> list[tuple[int, bool]]:
    model, optimizer = _model_and_optimizer(overlap_sync_param=True)
    _step(model, optimizer)
    progress = _Progress()
    for module in (model.embedding, *model.layers.values(), model.norm):
        module.register_forward_hook(progress.advance)
    with _held_back(param_gather, "begin_all_gather", progress, last=len(model.layers._modules) + 2) as held:
        model(tokens(1, 8), labels=tokens(1, 8, seed=1))
    return [(begun, future.result()) for begun, future in held]


def test_parameters_are_gathered_while_the_layer_before_them_runs() -> None:
    """The gather of a block was still under way when the block before it had ended."""
    for found in run_ranks(2, _gathers):
        begun, timely = zip(*found, strict=True)
        assert all(timely)
        assert set(begun) == {1, 2}  # as the first block and the second began; those of the first in the update


Look = Callable[["_Model", torch.Tensor], torch.Tensor]


class _Model(torch.nn.Module):
    """Declares its blocks and calls them; before that it looks at some parameters."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look
        self.embedding = torch.nn.Embedding(64, 32)
        blocks = [torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)) for _ in "ab"]
        self.layers = torch.nn.ModuleList(blocks)
        self.head = torch.nn.Linear(32, 64)

    def blocks(self) -> list[torch.nn.Module]:
        return list(self.layers)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        seen = self.look(self, ids)
        x = self.embedding(ids)
        for block in self.layers:
            x = x + self.call(block, x)
        logits: torch.Tensor = self.head(x) + seen
        return logits

    def call(self, block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = block(x)
        return output


class _CallsModulesOfBlocks(_Model):
    """Never calls a block, but the modules in it."""

    def call(self, block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        up, act, down = block.children()
        output: torch.Tensor = down(act(up(x)))
        return output


class _CallsModulesOfCheckpointedBlocks(_CallsModulesOfBlocks):
    """A block's own forward is replaced, though nobody calls it."""

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        checkpoint_and_offload_blocks(self, recomputes=lambda index: True, offloaded=0)


class _LeavesBlocksOut(_Model):
    """Each rank calls one block only, and not the same."""

    def call(self, block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return super().call(block, x) if block is self.layers[dist.get_rank()] else x


class _UsesABlockOutside(_Model):
    """A weight of a block is the head's too."""

    def __init__(self, look: Look) -> None:
        super().__init__(look)
        self.head.weight = self.layers[1][0].weight


class _DeclaresNothing(_Model):
    """A model without blocks, which may read what it likes."""

    blocks = None  # type: ignore[assignment]


def _nothing(model: _Model, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(())


def _inside(model: _Model, ids: torch.Tensor) -> torch.Tensor:
    """A forward pass of the model within its own, as of a teacher that the model itself is."""
    model.look = _nothing
    with torch.no_grad():
        seen: torch.Tensor = model(ids)
    model.look = _inside
    return seen


def _waited_for(model: _Model, ids: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = model.layers[1][0].weight
    return wait_for_all_gather(weight).mean()


#: Models, what they read without calling a module, and whether some parameters are gathered lazily.
USES: dict[str, tuple[type[_Model], Look, bool]] = {
    "blocks": (_Model, _nothing, True),
    "modules of blocks": (_CallsModulesOfBlocks, _nothing, True),
    "modules of checkpointed blocks": (_CallsModulesOfCheckpointedBlocks, _nothing, True),
    "other blocks on each rank": (_LeavesBlocksOut, _nothing, True),
    "weights outside of blocks": (
        _Model,
        lambda model, ids: model.embedding.weight[ids] @ model.head.weight.t(),
        True,
    ),
    "a weight of a block, waited for": (_Model, _waited_for, True),
    "the same on one rank": (_Model, lambda m, ids: (_nothing if dist.get_rank() else _waited_for)(m, ids), True),
    "a pass within a pass": (_Model, _inside, True),
    "a block's weight outside": (_UsesABlockOutside, lambda model, ids: model.head.weight.mean(), True),
    "no blocks": (_DeclaresNothing, lambda model, ids: sum(p.square().mean() for p in model.parameters()), False),
}


def _used(rank: int, world_size: int, use: str, lazily: bool) -> tuple[list[torch.Tensor], int, int]:
    """Parameters after three steps; of how many buckets how many were ready when the last update had ended."""
    assert dist.group.WORLD is not None
    torch.manual_seed(0)
    model_class, look, _ = USES[use]
    model = place_replicated(model_class(look))
    config = HybridZeroConfig(reduce_bucket_size=1000, overlap_sync_param=lazily)
    groups = ProcessGroups(zero=Group.of(ParallelMode.ZERO1, dist.group.WORLD))
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), config, groups)
    for step in range(3):
        optimizer.zero_grad()
        model(tokens(8, seed=10 * step + rank)).logsumexp(-1).sum().backward()
        optimizer.step(1e-2, 0.95)
    ready, buckets = optimizer._gatherer.ready, len(optimizer._gatherer.buckets)
    optimizer.gather_parameters()
    return [parameter.detach().clone() for parameter in model.parameters()], ready, buckets


@pytest.mark.parametrize("use", USES)
def test_no_parameter_is_used_before_it_is_gathered(use: str) -> None:
    eager, lazy = (run_ranks(2, _used, use, lazily) for lazily in (False, True))
    for (one, _, _), (other, ready, buckets) in zip(eager, lazy, strict=True):
        assert all(map(torch.equal, one, other))
        assert 0 < ready < buckets if USES[use][2] else ready == buckets


def _adopted(rank: int, world_size: int) -> str:
    model, optimizer = _model_and_optimizer(overlap_sync_param=True)
    _step(model, optimizer)
    with pytest.raises(UserError) as caught:
        optimizer.copy_model_to_main_params()
    optimizer.gather_parameters()
    optimizer.copy_model_to_main_params()
    return str(caught.value)


def test_parameters_that_gathers_may_overwrite_are_not_adopted() -> None:
    for message in run_ranks(2, _adopted):
        assert re.match(
            r"optimizer\.copy_model_to_main_params\(\): \d+ of \d+ parameter buckets are not gathered yet", message
        )


def _state(rank: int, world_size: int) -> str:
    model, optimizer = _model_and_optimizer(overlap_sync_param=True)
    _step(model, optimizer)
    try:
        model.state_dict()
    except UserError as error:
        optimizer.gather_parameters()
        assert model.state_dict()
        return str(error)
    return "nothing"


def test_the_state_of_a_model_that_is_not_there_is_refused() -> None:
    for message in run_ranks(2, _state):
        assert re.match(
            r"model\.state_dict\(\): \d+ of \d+ parameter buckets are not gathered yet \(overlap_sync_param\)\. Call ",
            message,
        )


# -- what can't be foreseen


@pytest.mark.parametrize("begins", [False, True])
def test_more_gradients_than_in_the_first_step_are_refused(begins: bool) -> None:
    """The reduction had begun because the counts of the first step were reached, or by ``begin_reduction``."""
    (message,) = run_ranks(1, _surprised, begins)
    assert message.startswith("hybrid_zero_optimizer.overlap_sync_grad: a gradient of 'output.weight' was ")


def _surprised(rank: int, world_size: int, begins: bool) -> str:
    model, optimizer = _model_and_optimizer(overlap_sync_grad=True)
    if not begins:
        _step(model, optimizer)
    optimizer.begin_step(micro_batches=2 if begins else 1)
    for _ in range(2):
        loss = model(tokens(1, 8), labels=tokens(1, 8, seed=1)).loss_sum
        try:
            loss.backward()
        except UserError as error:
            return str(error)
        if begins:
            optimizer.begin_reduction()
    return "nothing"
