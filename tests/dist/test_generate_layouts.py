"""Generation on ranks that share a model: the tokens of one process, on every rank."""

from __future__ import annotations

import pytest
import torch

from internlm.eval import generate
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.train import initialize_model_and_parallel_communicator
from internlm.utils.errors import UserError
from tests.dist.tiny import TINY
from tests.harness.pool import run_ranks

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9, 7, 9]]
#: Windows, QK-norm and two rope bases; a vocabulary that 2 does not divide.
GEMMA3 = ("model_type=GEMMA3", "model.num_layers=4", "model.sliding_window=4", "model.global_layers=(1,)")
GEMMA3 = (*GEMMA3, "model.vocab_size=63", "model.embedding_init_std=0.05", "model.qk_norm=projection")
GEMMA3 = (*GEMMA3, *(f"model.{name}_init_std=0.5" for name in ("attn_wqkv", "attn_other", "ffn_uplayer", "ffn_other")))

LAYOUTS: list[tuple[int, tuple[str, ...]]] = [
    (2, ("parallel.tensor.mode=mtp", "parallel.tensor.size=2")),
    (2, ("parallel.pipeline.size=2", "model.num_chunks=2")),
    (2, ("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.weight.size=2")),
]
MORE_LAYOUTS: list[tuple[int, tuple[str, ...]]] = [
    (1, ("model.num_chunks=2",)),
    (2, ("parallel.tensor.mode=fsp", "parallel.tensor.size=2")),
    (2, ("parallel.pipeline.size=2", "model.num_chunks=2", "parallel.pipeline.mode=ZBV")),
    (2, ("parallel.zero1.size=2", "parallel.zero1.fsdp=True")),
    (4, ("parallel.tensor.mode=msp", "parallel.tensor.size=2", "parallel.pipeline.size=2")),
    (4, ("parallel.tensor.mode=isp", "parallel.tensor.size=2", "parallel.pipeline.size=2")),
]


def _generated(rank: int, world_size: int, overrides: tuple[str, ...]) -> list[list[list[int]]]:
    initialize_distributed_env(TINY, overrides=("data.micro_num=4", *GEMMA3, *overrides))
    model, _ = initialize_model_and_parallel_communicator(create_model(trains=False))
    greedy = generate(model, PROMPTS, 9, temperature=0, batch_size=3)
    sampled = generate(model, PROMPTS, 9, top_k=20, repetition_penalty=1.2, seed=[1, 2, 3, 4], stop=7)
    # Sequences stop one after the other, so that those that have stopped are left out, of padded batches too.
    stops = {greedy[0][1], greedy[1][3], greedy[2][5]}
    return [greedy, sampled, generate(model, PROMPTS, 9, temperature=0, stop=stops)]


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    (tokens,) = run_ranks(1, _generated, ())
    return tokens


@pytest.mark.parametrize(
    ("ranks", "layout"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.wide) for row in MORE_LAYOUTS)]
)
def test_every_rank_generates_the_tokens_of_one_process(
    ranks: int, layout: tuple[str, ...], alone: list[list[list[int]]]
) -> None:
    assert run_ranks(ranks, _generated, layout) == [alone] * ranks
    assert len({token for ids in alone[0] for token in ids}) > 5  # not one token over and over


def _nan(rank: int, world_size: int) -> str:
    initialize_distributed_env(TINY, overrides=("data.micro_num=4", "parallel.pipeline.size=2"))
    model, _ = initialize_model_and_parallel_communicator(create_model(trains=False))
    with torch.no_grad():
        if hasattr(model, "embedding"):
            model.embedding.weight[5] = float("nan")
    with pytest.raises(UserError) as caught:
        generate(model, [[1, 2], [3, 5]], 2)
    return str(caught.value)


def test_all_stages_report_logits_that_are_nan() -> None:
    assert set(run_ranks(2, _nan)) == {"generate(model=…): its logits are NaN. Check the checkpoint and the dtype"}
