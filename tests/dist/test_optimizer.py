"""However the optimizer's state is shared, sent and overlapped, and whichever rule updates the parameters: after three
steps with clipping they are those of one process, and what was sent is that of the formula."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.utils.errors import ConfigError
from tests.dist.oracle import verify
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

STEPS = 3

#: Ranks and overrides.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "data": (2, ()),
    "replicas": (4, ("parallel.zero1.size=2",)),
    "four shards": (4, ("data.micro_num=2",)),
    "state whole": (2, ("parallel.zero1.size=1",)),
    "mtp": (4, ("parallel.tensor.size=2",)),
    "msp": (4, ("parallel.tensor.size=2", "parallel.tensor.mode=msp", "model_type=INTERNLM")),
    "fsp": (2, ("parallel.tensor.size=2", "parallel.tensor.mode=fsp")),
    "isp": (4, ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")),
    "isp, overlapped": (
        4,
        ("parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.weight.overlap=True", "model.checkpoint=0.5"),
    ),
    "isp, padded": (4, ("parallel.tensor.mode=isp", "parallel.weight.size=4", "model.vocab_size=67")),
    "pipeline": (4, ("parallel.pipeline.size=2", "parallel.pipeline.mode=ZBH1", "data.micro_num=4")),
    "tied pipeline": (4, ("parallel.pipeline.size=2", "model.tie_word_embeddings=True", "data.micro_num=4")),
}

ZERO = "hybrid_zero_optimizer"
BUCKETS = (f"{ZERO}.reduce_bucket_size=5000",)
WHOLE = (f"{ZERO}.use_split_tensor_optim=False",)
GRADS, PARAMETERS = (f"{ZERO}.overlap_sync_grad=True", *BUCKETS), (f"{ZERO}.overlap_sync_param=True", *BUCKETS)
MUON, LION = ("optimizer.type=Muon",), ("optimizer.type=Lion", "adam.lr=1e-4")
GROUPS = (
    "optimizer.param_groups=[{'pattern':'^embedding','lr_scale':0.1},{'pattern':'wo','type':'Lion','weight_decay':0}]",
)

ROWS: list[tuple[str, tuple[str, ...]]] = [
    *((name, BUCKETS) for name in ("data", "replicas", "msp", "isp")),
    *((name, WHOLE) for name in ("data", "replicas", "four shards", "msp", "isp", "tied pipeline")),
    *((name, (*WHOLE, *BUCKETS)) for name in ("data", "mtp")),
    *((name, GRADS) for name in ("data", "replicas", "fsp", "isp, overlapped", "pipeline", "tied pipeline")),
    *((name, PARAMETERS) for name in ("data", "replicas", "msp", "isp, overlapped", "pipeline", "tied pipeline")),
    *((name, (*GRADS, *PARAMETERS, *WHOLE)) for name in ("four shards", "mtp", "isp", "pipeline")),
    *((name, MUON) for name in ("data", "state whole", "mtp", "fsp", "isp", "isp, padded", "pipeline")),
    *((name, (*MUON, *GRADS, *PARAMETERS)) for name in ("replicas", "msp")),
    *((name, LION) for name in ("replicas", "msp", "isp")),
    *((name, GROUPS) for name in ("data", "mtp", "pipeline")),
]


def assert_equal(layout: str, case: tuple[str, ...], steps: int = STEPS) -> None:
    ranks, sizes = LAYOUTS[layout]
    report, _ = verify(ranks, (*sizes, *case), steps=steps)
    assert report.failures == []


#: Left to the widest sweep: each half of them is in another row, with another half.
WIDE = [
    *((name, BUCKETS) for name in ("replicas", "isp")),
    *((name, WHOLE) for name in ("data", "replicas", "msp", "four shards")),
    *((name, GRADS) for name in ("data", "fsp", "pipeline")),
    *((name, PARAMETERS) for name in ("replicas", "msp", "pipeline", "tied pipeline")),
    *((name, MUON) for name in ("data", "mtp")),
    *((name, LION) for name in ("msp", "isp")),
    ("mtp", GROUPS),
]


def _rows() -> Iterator[object]:
    for name, case in ROWS:
        marks = [pytest.mark.wide] if (name, case) in WIDE else []
        yield pytest.param(name, case, marks=marks, id=f"{name}-{','.join(case)}")


@pytest.mark.parametrize(("layout", "case"), list(_rows()))
def test_every_row(layout: str, case: tuple[str, ...]) -> None:
    assert_equal(layout, case)


def _refusal(rank: int, world_size: int, *patterns: str) -> str:
    groups = [{"pattern": pattern, "lr_scale": 0.5} for pattern in patterns]
    stages = ("parallel.pipeline.size=2", "data.micro_num=2")
    initialize_distributed_env(TINY, overrides=[*stages, f"optimizer.param_groups={groups}"])
    model, _ = initialize_model_and_parallel_communicator(create_model())
    try:
        initialize_optimizer(model)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_pattern_that_fits_no_parameter_of_any_stage_is_told() -> None:
    assert run_ranks(2, _refusal, "^embedding", "^output") == ["", ""]  # each is in another stage
    for message in run_ranks(2, _refusal, "^embedding", "^embeddings"):
        assert message.startswith(
            "optimizer.param_groups: pattern '^embeddings' matches no parameter. Correct it to match names such as "
        )
