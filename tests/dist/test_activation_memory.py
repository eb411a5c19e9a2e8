"""Recompute of attention, dropout and offloading change nothing, whatever the layout: a run is that of one process,
dropout with the same masks. What was sent is that of the formula. The engine is that of ``internlm verify``."""

from __future__ import annotations

import pytest

from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from tests.dist.oracle import verify
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

DROPOUT = ("model.drop_rate=0.3",)
KEPT = (*DROPOUT, "model.dropout_selective_checkpoint=False")
SELECTIVE = ("model.checkpoint=selective",)
PACKED: tuple[str, ...] = ()
UNPACKED = ("data.use_packed_dataset=False",)

#: Ranks, and how they share the model and the batch.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "data": (2, ()),
    "mtp": (4, ("parallel.tensor.size=2",)),
    "msp": (4, ("parallel.tensor.size=2", "parallel.tensor.mode=msp")),
    "fsp": (2, ("parallel.tensor.size=2", "parallel.tensor.mode=fsp")),
    "isp": (4, ("parallel.tensor.size=4", "parallel.tensor.mode=isp", "parallel.weight.size=2")),
    "isp, overlapped": (
        4,
        (
            *("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2"),
            *("parallel.weight.overlap=True", "parallel.weight.memory_pool=True"),
        ),
    ),
}
CASES: dict[str, tuple[str, ...]] = {
    "attention recomputed": (*SELECTIVE, *DROPOUT, *PACKED),
    "masks kept, half recomputed, offloaded": (*KEPT, "model.checkpoint=0.5", "model.cpu_offloading=1", *UNPACKED),
}
#: Each with two stages.
PIPELINES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1F1B of fsp": (4, ("parallel.tensor.size=2", "parallel.tensor.mode=fsp", *SELECTIVE, "model.cpu_offloading=1")),
    "ZB-H1 of msp": (
        4,
        ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "parallel.pipeline.mode=ZBH1", *SELECTIVE),
    ),
    "ZB-V of isp": (4, (*LAYOUTS["isp, overlapped"][1], "parallel.pipeline.mode=ZBV", *SELECTIVE)),
    "interleaved, data": (4, ("model.num_chunks=2", "model.checkpoint=0.5", "model.cpu_offloading=1", *KEPT)),
}


def assert_equal(ranks: int, overrides: tuple[str, ...]) -> None:
    report, _ = verify(ranks, overrides)
    assert report.failures == []
    for trace in (report.forward, report.backward):
        assert (trace.first, len(trace.compared)) == (None, len(trace.differences))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode(layout: str, case: str) -> None:
    ranks, sizes = LAYOUTS[layout]
    assert_equal(ranks, (*sizes, *CASES[case]))


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name: str) -> None:
    ranks, sizes = PIPELINES[name]
    assert_equal(ranks, ("parallel.pipeline.size=2", "model.num_layers=5", *sizes, *DROPOUT))


def _losses(rank: int, world_size: int, seed: int) -> list[float]:
    """Of one batch in the steps 0, 1 and 0 again, and twice in evaluation mode."""
    initialize_distributed_env(TINY, seed=seed, overrides=DROPOUT)
    model, communicator = initialize_model_and_parallel_communicator(create_model())
    batch = next(iter(build_train_loader_with_data_type()[0]))
    optimizer, beta2_schedule, lr_schedule = initialize_optimizer(model, communicator)
    trainer = initialize_trainer(model, optimizer, lr_schedule, beta2_schedule)
    assert trainer.scheduler.dropout_key.seed == seed

    def loss(step: int) -> float:
        trainer.state.step = step
        return trainer.execute_schedule(iter([batch]), forward_only=True).loss

    trainer.train()
    training = [loss(0), loss(1), loss(0)]
    trainer.eval()
    return [*training, loss(0), loss(1)]


def test_masks_follow_the_step_of_the_run() -> None:
    """So a run that is resumed goes on as it would have."""
    ((first, second, again, *evaluated),) = run_ranks(1, _losses, 7)
    assert again == first != second
    assert evaluated[0] == evaluated[1] not in (first, second)
