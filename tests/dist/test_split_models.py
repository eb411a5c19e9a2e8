"""Uses of a model that its layout rules out are refused with a reason."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.core.parallel import ParallelEmbedding, ParallelHead
from internlm.core.parallel.placement import normal
from internlm.eval import generate
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer
from internlm.utils.errors import UserError
from internlm.utils.registry import MODEL_INITIALIZER
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks


class ReturnsLogits(nn.Module):
    """A user's model of parallel layers that returns logits rather than the loss."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = ParallelEmbedding(model.vocab_size, model.hidden_size, 0.02)
        self.head = ParallelHead(model.hidden_size, model.vocab_size, normal(0.02), model.parallel_output)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None, indexes: Tensor | None = None) -> Tensor:
        """Compute logits."""
        return self.head.logits(self.embedding(input_ids.flatten()))


@MODEL_INITIALIZER.register_module(module_name="RETURNS_LOGITS")
def build(model: ModelConfig) -> nn.Module:
    """Build the model as a user registers it."""
    return ReturnsLogits(model)


def _start(mode: str, *overrides: str) -> nn.Module:
    layout = (f"parallel.tensor.mode={mode}", "parallel.tensor.size=2", "data.micro_num=1")
    initialize_distributed_env(TINY, overrides=(*layout, *overrides))
    return initialize_model_and_parallel_communicator(create_model())[0]


def _error(rank: int, world_size: int, mode: str, parallel_output: bool) -> str:
    model = _start(mode, "model_type=RETURNS_LOGITS", f"model.parallel_output={parallel_output}")
    optimizer, beta2, lr = initialize_optimizer(model)
    try:
        initialize_trainer(model, optimizer, lr, beta2)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", ["mtp", "msp", "isp"])
def test_logits_of_other_tokens_or_entries_than_the_labels_are_refused(mode: str) -> None:
    for parallel_output in (True, False):
        errors = run_ranks(2, _error, mode, parallel_output)
        fits = parallel_output == (mode == "isp")
        assert [not text for text in errors] == [fits, fits]
        assert fits or "Let forward take labels and return head.loss(x, labels)" in errors[0]


def _generated(rank: int, world_size: int, overrides: tuple[str, ...]) -> str:
    initialize_distributed_env(TINY, overrides=("data.micro_num=2", *overrides))
    with pytest.raises(UserError) as caught:
        generate(create_model(), [1, 2, 3], 2)
    return str(caught.value)


@pytest.mark.parametrize("overrides", [("parallel.tensor.size=2",), ("parallel.pipeline.size=2",)])
def test_generation_needs_all_ranks_of_a_model(overrides: tuple[str, ...]) -> None:
    assert set(run_ranks(2, _generated, overrides)) == {
        "generate(model=…): is split over ranks, but its communicators are not attached. Pass it through "
        "initialize_model_and_parallel_communicator first"
    }
    of_a_user = run_ranks(2, _generated, ("parallel.tensor.size=2", "model_type=RETURNS_LOGITS"))
    assert all("expected a whole model, got one split over ranks" in text for text in of_a_user)


def _shapes(rank: int, world_size: int, mode: str, parallel_output: bool) -> tuple[int, ...]:
    from internlm.data import build_train_loader_with_data_type

    model = _start(
        mode, f"model.parallel_output={parallel_output}", "model.vocab_size=3", "data.use_packed_dataset=True"
    )
    batch, _ = next(iter(build_train_loader_with_data_type()[0]))
    with_batch = model(batch["input_ids"][0], batch["cu_seqlens"][0], batch["indexes"][0])
    return tuple(with_batch.shape)


@pytest.mark.parametrize(
    ("mode", "parallel_output", "shapes"),
    [
        ("mtp", True, [(32, 2), (32, 1)]),
        ("mtp", False, [(32, 3), (32, 3)]),
        ("isp", True, [(16, 3), (16, 3)]),
        ("isp", False, [(32, 3), (32, 3)]),
    ],
)
def test_logits_have_the_shape_of_the_mode(mode: str, parallel_output: bool, shapes: list[tuple[int, int]]) -> None:
    assert run_ranks(2, _shapes, mode, parallel_output) == shapes
