"""A step of the optimizer, against torch's AdamW and clip_grad_norm_; and a step that is left out."""

from __future__ import annotations

import copy
import gc
import math
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm.accelerator import host_reads
from internlm.config.schema import AdamConfig, GradScalerConfig, HybridZeroConfig, OptimizerConfig
from internlm.core.context.group import Group
from internlm.core.parallel import place_replicated
from internlm.core.parallel.param_state import begin_accumulation, complete_main_grad, main_grad_of, placement_of
from internlm.core.scheduler import NonPipelineScheduler, TokenCrossEntropy
from internlm.core.trainer import Trainer
from internlm.solver.optimizer import HybridZeroOptimizer, LossScale
from internlm.utils.errors import UserError
from tests.unit.model.samples import decoder, tokens

STEPS = 4
BETA2 = [0.9, 0.95, 0.95, 0.99]  # of each step
LR = [0.0, 1e-2, 2e-2, 1e-2]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(STEPS):
        yield tokens(2, 8, seed=10 + step), tokens(2, 8, seed=20 + step)


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(ids, labels=labels, grad_scale=1 / labels.numel()).loss_sum


def clipping(norm: float, **options: Any) -> HybridZeroConfig:
    return HybridZeroConfig(clip_grad_norm=norm, **options)


def plain_run(model: nn.Module, adam: AdamConfig, clip: float) -> list[float]:
    """Train ``model`` with torch's own optimizer; the norms before clipping."""
    matrices = [p for p in model.parameters() if placement_of(p).is_matrix]
    others = [p for p in model.parameters() if not placement_of(p).is_matrix]
    decay = adam.weight_decay if adam.decay_norm_and_bias else 0.0
    groups = [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": others, "weight_decay": decay}]
    optimizer = torch.optim.AdamW(groups, lr=adam.lr, eps=adam.adam_eps, foreach=False)
    norms = []
    for (ids, labels), lr, beta2 in zip(batches(), LR, BETA2, strict=True):
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = lr, (adam.adam_beta1, beta2)
        optimizer.zero_grad()
        loss_of(model, ids, labels).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
        optimizer.step()
    return norms


def our_run(model: nn.Module, adam: AdamConfig, clip: float) -> list[float]:
    optimizer = HybridZeroOptimizer(model, adam, clipping(clip))
    norms = []
    for (ids, labels), lr, beta2 in zip(batches(), LR, BETA2, strict=True):
        optimizer.zero_grad()
        loss_of(model, ids, labels).backward()
        step = optimizer.step(lr, beta2)
        assert step.updated
        norms.append(step.grad_norm)
    return norms


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6], ids=["no clipping", "clipping", "clipping out of reach"])
@pytest.mark.parametrize("family", ["INTERNLM", "INTERNLM2"])
def test_steps_are_torchs(family: str, clip: float, decay_norm_and_bias: bool) -> None:
    adam = AdamConfig(lr=1e-2, weight_decay=0.1, adam_eps=1e-6, decay_norm_and_bias=decay_norm_and_bias)
    ours, theirs = decoder(family), decoder(family)
    norms = plain_run(theirs, adam, clip)
    assert min(norms) > 0.5
    assert our_run(ours, adam, clip) == pytest.approx(norms, rel=1e-12)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12), name


def test_float32_steps_are_torchs_too() -> None:
    """There the fused kernel does the clipping."""
    adam = AdamConfig(lr=1e-2, weight_decay=0.1)
    ours, theirs = (decoder(dtype=torch.float32) for _ in range(2))
    assert our_run(ours, adam, 0.5) == pytest.approx(plain_run(theirs, adam, 0.5), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-5


def test_clipping_under_a_loss_scale_is_that_of_the_true_gradients() -> None:
    """Adam's updates hardly depend on the scale of gradients, but its moments do."""
    moments = []
    for scale in (1.0, 1024.0):
        model, (ids, labels) = decoder(), next(batches())
        scaler = GradScalerConfig(fp16={"initial_scale": scale})  # type: ignore[arg-type]
        optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.5), loss_scale=LossScale(scaler))
        (loss_of(model, ids, labels) * scale).backward()
        assert optimizer.step(1e-2, 0.95).grad_norm > 0.5
        moments.append([optimizer.state_of(group)["exp_avg"] for group in optimizer.groups])
    for one, other in zip(*moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_tied_and_frozen_parameters() -> None:
    adam = AdamConfig(lr=1e-2, weight_decay=0.1)
    ours, theirs = (decoder(tie_word_embeddings=True) for _ in range(2))
    for model in (ours, theirs):
        model.layers["0"].requires_grad_(False)
    frozen = copy.deepcopy(ours.layers["0"].state_dict())
    assert our_run(ours, adam, 0.5) == pytest.approx(plain_run(theirs, adam, 0.5), rel=1e-12)
    assert ours.output.weight is ours.embedding.weight
    assert all(torch.equal(ours.layers["0"].state_dict()[name], value) for name, value in frozen.items())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_accumulate_over_micro_batches() -> None:
    adam, (ids, labels) = AdamConfig(lr=1e-2), next(batches())
    at_once, one_by_one = decoder(), decoder()
    optimizers = [HybridZeroOptimizer(model, adam, clipping(0.0)) for model in (at_once, one_by_one)]
    (2 * loss_of(at_once, ids, labels)).backward()
    for row in range(2):
        loss_of(one_by_one, ids[row : row + 1], labels[row : row + 1]).backward()
    norms = [optimizer.step(1e-2, 0.95).grad_norm for optimizer in optimizers]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


def test_bfloat16_parameters_are_the_rounded_main_parameters() -> None:
    model = decoder(dtype=torch.bfloat16)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(1.0))
    loss_of(model, *next(batches())).backward()
    before = [group.main_shards[0].clone() for group in optimizer.groups]
    assert optimizer.step(1e-4, 0.95).updated
    for group, main in zip(optimizer.groups, before, strict=True):
        assert group.main_shards[0].dtype == torch.float32
        assert not torch.equal(group.main_shards[0], main)
        assert torch.equal(group.values, group.main_shards[0].bfloat16())


def test_a_foreign_module_is_trained_once_it_is_placed() -> None:
    linear = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"model parameter 'weight': has no ParamPlacement"):
        HybridZeroOptimizer(linear, AdamConfig(lr=0.1), clipping(0.0))
    optimizer = HybridZeroOptimizer(place_replicated(linear), AdamConfig(lr=0.1), clipping(0.0))
    before = linear.bias.detach().clone()
    linear(torch.ones(1, 3)).sum().backward()
    assert optimizer.step(0.1, 0.95).grad_norm == pytest.approx(8**0.5)
    assert not torch.equal(linear.bias, before)


@pytest.mark.parametrize("begin", ["nothing", "model.zero_grad"])
def test_a_step_without_new_gradients_is_refused(begin: str) -> None:
    """The gradients of the last step would count again, in some layouts."""
    model = decoder()
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.0))
    for step in range(2):
        if begin == "model.zero_grad":
            model.zero_grad()
        loss_of(model, *next(batches())).backward()
        if step == 0:
            optimizer.step(1e-2, 0.95)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(
        UserError, match=r"^optimizer\.step: no new gradients .*\. Call trainer\.zero_grad\(\) or optimizer"
    ):
        optimizer.step(1e-2, 0.95)
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.zero_grad()
    assert optimizer.step(1e-2, 0.95).updated


def test_zero_grad_forgets() -> None:
    model = decoder()
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.0))
    loss_of(model, *next(batches())).backward()
    optimizer.zero_grad()
    assert optimizer.step(0.0, 0.95).grad_norm == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_parameter_without_a_gradient_in_this_step_has_a_zero_one(overlap: bool) -> None:
    """And not that of the last step; its grad is None until then, as after torch's zero_grad."""
    model = decoder()
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.0, overlap_sync_grad=overlap))
    table, scale = model.embedding.weight, model.norm.weight
    for used in (model.norm, nn.Identity()):
        optimizer.begin_step(1)
        assert all(parameter.grad is None for parameter in model.parameters())
        used(model.embedding(tokens(1, 8)[0])).square().sum().backward()
        norm = optimizer.step(0.0, 0.95).grad_norm
        assert norm == pytest.approx(torch.cat([table.grad.flatten(), scale.grad]).norm().item(), rel=1e-6)
        assert scale.grad.any() == (used is model.norm)


def test_a_script_may_assign_gradients_itself() -> None:
    model = decoder()
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.0))
    for value in (3.0, 2.0):
        optimizer.zero_grad()
        model.norm.weight.grad = torch.full_like(model.norm.weight, value)
        expected = value * model.norm.weight.numel() ** 0.5
        assert optimizer.step(0.0, 0.95).grad_norm == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["AdamW", "Lion", "Muon"])
def test_a_step_after_one_without_a_finite_norm_is_as_if_it_had_not_been(rule: str) -> None:
    """Its gradients, which are all NaN after the division by the norm, leave nothing in buffers or padding."""
    models = [decoder() for _ in range(2)]
    for poisoned, model in enumerate(models):
        optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.5), optimizer=OptimizerConfig(type=rule))
        for attempt in range(1 + poisoned):
            is_bad = attempt < poisoned
            optimizer.zero_grad()
            (loss_of(model, *next(batches())) * (math.nan if is_bad else 1.0)).backward()
            assert optimizer.step(1e-2, 0.95).updated == (not is_bad)
    assert all(map(torch.equal, models[1].parameters(), models[0].parameters()))


def test_a_reduction_that_was_begun_is_the_one_that_the_step_takes() -> None:
    models = [decoder() for _ in range(2)]
    zero = clipping(0.5, overlap_sync_grad=True)
    optimizers = [HybridZeroOptimizer(model, AdamConfig(lr=1e-2), zero) for model in models]
    for begun, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        for batch in batches():
            optimizer.zero_grad()
            loss_of(model, *batch).backward()
            if begun:
                optimizer.begin_reduction()
            assert optimizer.step(1e-2, 0.95).updated
            assert optimizer._reducer.begun == []
    assert all(map(torch.equal, models[1].parameters(), models[0].parameters()))


def test_the_number_of_micro_batches_may_change_from_step_to_step() -> None:
    """As under a ramp-up of the batch size: with overlap, when a gradient is ready depends on it."""
    models = [decoder() for _ in range(2)]
    for overlap, model in enumerate(models):
        zero = clipping(0.5, overlap_sync_grad=bool(overlap), reduce_bucket_size=2000)
        optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), zero)
        for micro_batches in (1, 1, 2, 2, 3, 1, 2):
            optimizer.begin_step(micro_batches)
            for index in range(micro_batches):
                loss_of(model, tokens(2, 8, seed=10 + index), tokens(2, 8, seed=20 + index)).backward()
            optimizer.begin_reduction()
            assert optimizer.step(1e-2, 0.95).updated
    assert all(map(torch.equal, models[1].parameters(), models[0].parameters()))


def test_zero_grad_forgets_a_reduction_too() -> None:
    model = decoder()
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.0, overlap_sync_grad=True))
    loss_of(model, *next(batches())).backward()
    optimizer.begin_reduction()
    assert optimizer._reducer.begun
    optimizer.zero_grad()
    assert optimizer._reducer.begun == []
    assert optimizer.step(0.0, 0.95).grad_norm == 0


# -- a step that is left out


@pytest.fixture(params=["AdamW", "Lion", "Muon"])
def trainer(request: pytest.FixtureRequest, alone: Group) -> Trainer:
    """A trainer that has done one good step."""
    model = decoder(dtype=torch.float32)
    rule = OptimizerConfig(type=request.param)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(1.0), optimizer=rule)
    schedule = NonPipelineScheduler(TokenCrossEntropy(model), 1, alone, torch.device("cpu"))
    trainer = Trainer(model, optimizer, schedule, lambda _: 1e-2, lambda _: 0.95)
    trainer.train_step(batch_iterator())
    return trainer


def batch_iterator() -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One batch of two micro-batches."""
    ids, labels = tokens(2, 1, 8), tokens(2, 1, 8, seed=4)
    yield {"input_ids": ids, "type_ids": torch.zeros_like(ids)}, labels


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of parameters and optimizer state."""
    state = {f"model {name}": value for name, value in trainer.model.state_dict().items()}
    for number, group in enumerate(trainer.optimizer.groups):
        state |= {f"{number} {key}": value for key, value in trainer.optimizer.state_of(group).items()}
        state |= {f"{number} main {part}": value for part, value in enumerate(group.main_shards)}
    return {name: value.clone() for name, value in state.items()}


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def put(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[3] = value
        return grad

    return put


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted(trainer: Trainer, value: float) -> None:
    before = everything(trainer)
    hook = trainer.model.embedding.weight.register_hook(poison(value))
    report = trainer.train_step(batch_iterator())
    hook.remove()
    assert not report.update.updated
    assert not math.isfinite(report.update.grad_norm)
    after = everything(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (trainer.state.step, trainer.state.inf_nan_skip_batches) == (2, 1)


def test_the_step_after_a_bad_one_is_as_if_it_had_not_been(trainer: Trainer) -> None:
    hook = trainer.model.embedding.weight.register_hook(poison(math.nan))
    trainer.train_step(batch_iterator())
    hook.remove()
    report = trainer.train_step(batch_iterator())
    assert report.update.updated
    assert all(value.isfinite().all() for value in everything(trainer).values())
    assert (trainer.state.step, trainer.state.inf_nan_skip_batches) == (3, 1)
    assert trainer.optimizer.updates == 2


def test_a_step_with_a_bad_loss_and_good_gradients_changes_nothing_and_is_counted(trainer: Trainer) -> None:
    before = everything(trainer)
    trainer.zero_grad()
    trainer.execute_schedule(batch_iterator())
    trainer.execute_schedule(batch_iterator()).sums[0] += math.nan
    update = trainer.step()
    assert (update.updated, update.skipped_in_a_row, math.isfinite(update.grad_norm)) == (False, 1, True)
    after = everything(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (trainer.state.step, trainer.state.inf_nan_skip_batches) == (2, 1)


@pytest.mark.parametrize("size", [None, 100, 5000], ids=str)
def test_the_parameter_of_a_bad_gradient_is_named(size: int | None) -> None:
    model = decoder(dtype=torch.float32)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), HybridZeroConfig(reduce_bucket_size=size))
    for name, parameter in model.named_parameters():
        for index in (0, parameter.numel() - 1):
            optimizer.zero_grad()
            for other in model.parameters():
                complete_main_grad(other)
            main_grad_of(parameter).view(-1)[index] = math.inf
            update = optimizer.step(1e-2, 0.95)
            assert not update.updated
            assert name in (optimizer.first_nonfinite(update) or "").split(" or ")
            local = update.local_gradients
            assert local is None or local.first_nonfinite() == name
    assert update.local_gradients, "gradients are checked before the reduction after a skipped step"
    for _ in range(2):
        optimizer.zero_grad()
        update = optimizer.step(1e-2, 0.95)
    assert (update.local_gradients, optimizer.first_nonfinite(update)) == (None, None)


# -- what the host reads


@pytest.mark.parametrize("scaler", [None, GradScalerConfig()], ids=["constant scale", "dynamic scale"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_host_reads_a_step_once_and_only_when_asked(
    micro_batches: int, scaler: GradScalerConfig | None, alone: Group
) -> None:
    model = decoder(dtype=torch.float32)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(1.0), loss_scale=LossScale(scaler))
    schedule = NonPipelineScheduler(TokenCrossEntropy(model), 1, alone, torch.device("cpu"))
    trainer = Trainer(model, optimizer, schedule, lambda _: 1e-2, lambda _: 0.95)
    ids, labels = tokens(micro_batches, 1, 8), tokens(micro_batches, 1, 8, seed=4)
    batch = {"input_ids": ids, "type_ids": torch.zeros_like(ids)}, labels
    before = host_reads()
    reports = [trainer.train_step(iter([batch])) for _ in range(3)]
    assert host_reads() == before
    reports[-1].read()
    assert reports[-1].result.loss > 0
    assert reports[-1].update.updated
    assert reports[-1].update.grad_norm > 0
    assert host_reads() - before == {"metrics of a step": 1}


@pytest.mark.parametrize("limit", [1, 2])
def test_a_step_that_may_end_the_run_is_read_once_too(limit: int, alone: Group) -> None:
    """Whether it does is not known before; the loss comes with it."""
    model = decoder(dtype=torch.float32)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(1.0, max_skipped_steps=limit))
    schedule = NonPipelineScheduler(TokenCrossEntropy(model), 1, alone, torch.device("cpu"))
    trainer = Trainer(model, optimizer, schedule, lambda _: 1e-2, lambda _: 0.95)
    for _ in range(3):
        before = host_reads()
        report = trainer.train_step(batch_iterator())
        report.read()
        assert report.result.loss > 0
        assert host_reads() - before == {"metrics of a step": 1}
    model.embedding.weight.register_hook(poison(math.nan))
    for _ in range(limit - 1):
        trainer.train_step(batch_iterator())
    with pytest.raises(UserError, match=rf"{limit} steps in a row .* \(first in embedding.weight on rank 0\)"):
        trainer.train_step(batch_iterator())


# -- what others do to the model


def test_a_model_that_was_converted_is_refused() -> None:
    model = decoder()
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2))
    model.half()
    with pytest.raises(UserError, match=r"model: 'embedding.weight' was moved out of the optimizer's buffer"):
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_were_set_are_adopted(dtype: torch.dtype) -> None:
    model = decoder(dtype=dtype)
    optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2, weight_decay=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    optimizer.copy_model_to_main_params()
    optimizer.zero_grad()
    optimizer.step(1e-2, 0.95)
    assert all((parameter == 0.5).all() for parameter in model.parameters())


# -- how much work it is


def calls_of(action: Callable[[], object]) -> int:
    """Calls of Python functions and of others, without those of the garbage collector's finalisers."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["AdamW", "Lion"])
def test_a_step_calls_nothing_for_each_parameter(rule: str, dtype: torch.dtype) -> None:
    found = []
    for layers in (1, 5):
        model = decoder(num_layers=layers, dtype=dtype)
        config = OptimizerConfig(type=rule)
        optimizer = HybridZeroOptimizer(model, AdamConfig(lr=1e-2), clipping(0.5), optimizer=config)
        optimizer.step(1e-2, 0.95)
        optimizer.begin_step()
        for parameter in model.parameters():
            begin_accumulation(parameter)  # as a backward pass does
        found.append(calls_of(lambda optimizer=optimizer: optimizer.step(1e-2, 0.95)))
    assert found[0] == found[1]
