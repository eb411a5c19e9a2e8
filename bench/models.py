"""Models beside ``transformers``: ``python -m bench.models generate`` and ``convert``.

``generate``: greedy generation with a cache of keys and values, in turns, and the floor of a step. That is the time in
which the cores read all weights once, since every token needs each of them.

``convert``: Hugging Face folders as checkpoints, and back, beside a copy of the same bytes (``bench/convert.py``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench import convert
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
    """Return the duration of one call: CPU time with one thread, which other work on the machine changes little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


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


def continuations(model: LlamaForCausalLM, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Generate by ``transformers``, greedily: ids [B, T] → ``new_tokens`` ids for each row."""
    options = dict(max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(prompts))
    return model.generate(prompts, **options)[:, prompts.shape[1] :].tolist()


def floor_seconds(model: Decoder) -> float:
    """Return the median time of reading all weights of matrices once, as one sum of their bytes."""
    numel = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    weights = torch.ones(numel)
    return median(seconds(weights.sum) for _ in range(9))


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True, metavar="PART")
    generation = parts.add_parser("generate", help="greedy generation")
    add_arguments(generation)
    generation.set_defaults(run=run)
    conversion = parts.add_parser("convert", help="conversion of Hugging Face folders")
    convert.add_arguments(conversion)
    conversion.set_defaults(run=convert.run)
    args = parser.parse_args(arguments)
    args.run(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.models generate``."""
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts that run together")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)


def run(args: argparse.Namespace) -> None:
    """Print tokens per second of both, and the ratio of medians."""
    torch.set_num_threads(args.threads)
    ours, theirs = models()
    floor = floor_seconds(ours)
    print(f"floor: {floor * 1e3:.2f} ms a step, {1 / floor:.0f} tokens/s and sequence")
    for batch in args.batch:
        prompts = torch.randint(VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
        by_ours = partial(generate, ours, prompts, args.new_tokens, temperature=0, batch_size=batch)
        by_theirs = partial(continuations, theirs, prompts, args.new_tokens)
        assert by_ours() == by_theirs()  # also warms up
        turns = [(seconds(by_ours), seconds(by_theirs)) for _ in range(args.rounds)]
        mine, peer = (batch * args.new_tokens / median(side) for side in zip(*turns, strict=True))
        print(f"batch {batch}: {mine:.1f} tokens/s, transformers {peer:.1f}, ratio {mine / peer:.2f}")


if __name__ == "__main__":
    main()
