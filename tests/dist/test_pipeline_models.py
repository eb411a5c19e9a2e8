"""Users' own models in a pipeline: one that can be split is trained as on one process, one that can't is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.core.parallel import current_stage_layers, place_replicated
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.utils.errors import UserError
from internlm.utils.registry import MODEL_INITIALIZER
from internlm.verify.record import RankRecord
from tests.dist.oracle import run
from tests.dist.test_pipeline import assert_equal
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks
from tests.unit.train.test_build_model import MISTAKES


class Chain(nn.Module):
    """A user's model of torch's own modules that can be split: it draws all layers, and keeps its part."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.stage_layers = current_stage_layers(config.num_layers)
        embedding, head = nn.Embedding(config.vocab_size, width), nn.Linear(width, config.vocab_size)
        layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(config.num_layers)]
        if self.stage_layers.has_embedding:
            self.embedding = embedding
        self.layers = nn.ModuleDict({str(n): layers[n] for numbers in self.stage_layers.chunks for n in numbers})
        if self.stage_layers.has_head:
            self.head = head

    def blocks(self) -> list[nn.Module]:
        """The layers held here."""
        return list(self.layers.values())

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        indexes: Tensor | None = None,
        *,
        chunk: int = 0,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [*input_ids.shape, vocab_size], or hidden units for the next chunk."""
        x = self.embedding(input_ids) if hidden is None else hidden
        for number in self.stage_layers.chunks[chunk]:
            x = x + self.layers[str(number)](x).tanh()
        return self.head(x) if self.stage_layers.is_last(chunk) else x


class Foretold(Chain):
    """The same; the shape of what its chunks give is known before."""

    def hidden_like(self, inputs: dict[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """[*input_ids.shape, hidden_size]."""
        weight = next(iter(self.layers.parameters()))
        return (*inputs["input_ids"].shape, len(weight)), weight.dtype


class Growing(Chain):
    """The same; what its chunks give has more rows in each step, which the next chunk ignores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.forwards = 0

    def hidden_like(self, inputs: dict[str, Tensor]) -> None:
        """Unknown, whatever the inputs."""

    def forward(self, input_ids: Tensor, *args: Any, hidden: Tensor | None = None, **options: Any) -> Tensor:
        """Logits, or hidden units for the next chunk with a row more after every two forward passes."""
        given = None if hidden is None else hidden[:, : input_ids.shape[1]]
        x = super().forward(input_ids, *args, hidden=given, **options)
        self.forwards += 1
        return x if self.stage_layers.has_head else nn.functional.pad(x, (0, 0, 0, (self.forwards - 1) // 2))


@MODEL_INITIALIZER.register_module(module_name="CHAIN")
def build_chain(config: ModelConfig) -> nn.Module:
    """What a user registers."""
    return place_replicated(Chain(config))


@MODEL_INITIALIZER.register_module(module_name="FORETOLD")
def build_foretold(config: ModelConfig) -> nn.Module:
    """What a user registers."""
    return place_replicated(Foretold(config))


@MODEL_INITIALIZER.register_module(module_name="GROWING")
def build_growing(config: ModelConfig) -> nn.Module:
    """What a user registers."""
    return place_replicated(Growing(config))


def _run(rank: int, world_size: int, *args: Any) -> RankRecord:
    """That a worker finds this function makes it know the models above."""
    return run(rank, world_size, *args)


@pytest.mark.parametrize(("mode", "chunks"), [("1F1B", 1), ("1F1B", 2), ("ZBH1", 1), ("ZBV", 2)])
@pytest.mark.parametrize("model_type", ["CHAIN", "FORETOLD"])
def test_a_users_model(model_type: str, mode: str, chunks: int) -> None:
    packed = model_type == "FORETOLD"
    sizes = ("parallel.pipeline.size=4", f"model.num_chunks={chunks}", "model.num_layers=9", "data.micro_num=4")
    assert_equal(
        [f"model_type={model_type}", f"parallel.pipeline.mode={mode}", *sizes, f"data.use_packed_dataset={packed}"],
        4,
        _run,
    )


def test_hidden_states_whose_shape_varies() -> None:
    sizes = ("parallel.pipeline.size=2", "model.num_layers=4", "data.micro_num=2")
    assert_equal(["model_type=GROWING", *sizes, "data.use_packed_dataset=False"], 2, _run)


def _refused(rank: int, world_size: int, overrides: list[str]) -> str:
    initialize_distributed_env(TINY, overrides=overrides)
    with pytest.raises(UserError) as caught:
        create_model()
    return str(caught.value)


@pytest.mark.parametrize("more", ["parallel.pipeline.size=2", "model.num_chunks=2"])
def test_a_model_that_cannot_be_split(more: str) -> None:
    said = run_ranks(2, _refused, ["model_type=PLAIN", "model.num_layers=4", "data.micro_num=2", more])
    pipeline, chunks = (2, 1) if "pipeline" in more else (1, 2)
    assert set(said) == {
        f"model_type: 'PLAIN' was not built for parallel.pipeline.size={pipeline}, model.num_chunks={chunks}: its "
        "stage_layers differ from those of this rank. Build it with "
        "internlm.core.parallel.current_stage_layers, or set parallel.pipeline.size and model.num_chunks to 1"
    }


def _refused_function(rank: int, world_size: int, mistake: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_INITIALIZER._modules, "OWN", MISTAKES[mistake][0])
        return _refused(rank, world_size, ["model_type=OWN"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_registered_function_that_does_not_suit(mistake: str) -> None:
    """Also where the memory that its model needs is computed first."""
    (message,) = run_ranks(1, _refused_function, mistake)
    assert re.search(MISTAKES[mistake][1], message)
