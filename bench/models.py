"""Models beside ``transformers``: ``python -m bench.models generate``.

``generate``: greedy generation with a cache of keys and values, in turns, and the floor of a step. That is the time in
which the cores read all weights once, since every token needs each of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.yardsticks import LLAMA_30M, YARDSTICKS
from internlm.config import load_config
from internlm.eval import generate
from internlm.model.decoder import Decoder
from internlm.model.hf_config import to_hf_config
from internlm.model.hf_tensors import hf_tensors
from internlm.train.build_model import build_model

VOCAB = YARDSTICKS["bench-30M"].vocab_size
PROMPT = 64


def seconds(run: Callable[[], object]) -> float:
    """Return the duration of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def models() -> tuple[Decoder, LlamaForCausalLM]:
    """Build the model of this framework, and that of ``transformers`` with its weights."""
    config = load_config(
        dict(
            model_type="LLAMA2",
            model=LLAMA_30M | dict(vocab_size=VOCAB),
            data=dict(seq_len=2048, micro_bsz=1, total_steps=1),
            adam=dict(lr=1e-4),
        ),
        world_size=1,
        device_type="cpu",
    )
    ours = build_model(config, seed=0)
    assert isinstance(ours, Decoder)
    keys = to_hf_config("LLAMA2", ours.spec) | dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    theirs = LlamaForCausalLM(LlamaConfig(**keys, attn_implementation="sdpa")).eval()
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.load_state_dict({row.name: row.of(parameters[row.ours]) for row in hf_tensors(ours.spec)}, strict=False)
    return ours, theirs


def floor_seconds(model: Decoder) -> float:
    """Return the median time of reading all weights of matrices once, as one sum of their bytes."""
    numel = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    weights = torch.ones(numel)
    return median(seconds(weights.sum) for _ in range(9))


def main(arguments: list[str] | None = None) -> None:
    """Print tokens per second of both, and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["generate"], help="what to measure")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts that run together")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    ours, theirs = models()
    floor = floor_seconds(ours)
    print(f"floor: {floor * 1e3:.2f} ms a step, {1 / floor:.0f} tokens/s and sequence")
    for batch in args.batch:
        prompts = torch.randint(VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(1))

        def by_ours() -> list[list[int]]:
            return generate(ours, prompts, args.new_tokens, temperature=0, batch_size=batch)  # noqa: B023

        def by_theirs() -> list[list[int]]:
            options = dict(max_new_tokens=args.new_tokens, do_sample=False, attention_mask=torch.ones_like(prompts))  # noqa: B023
            return theirs.generate(prompts, **options)[:, PROMPT:].tolist()  # noqa: B023

        assert by_ours() == by_theirs()  # also warms up
        turns = [(seconds(by_ours), seconds(by_theirs)) for _ in range(args.rounds)]
        mine, peer = (batch * args.new_tokens / median(side) for side in zip(*turns, strict=True))
        print(f"batch {batch}: {mine:.1f} tokens/s, transformers {peer:.1f}, ratio {mine / peer:.2f}")


if __name__ == "__main__":
    main()
