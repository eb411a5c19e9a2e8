"""Forward and backward pass of each family against the model of ``transformers`` with the same weights.

``python -m bench.families [FAMILY …] [--rounds 7] [--sequences 2] [--length 512]`` prints a line for each family:
tokens per second of both, and their ratio. The sides take turns in one process with one thread; figures are medians
over the rounds. Both compute the mean loss of all tokens and the gradients of all weights; neither updates them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bench.yardsticks import LLAMA_30M
from internlm.accelerator import processor
from internlm.config.schema import ModelConfig
from internlm.core.parallel.initialization import initialize_parameters
from internlm.model.decoder import Decoder
from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.model.hf_config import FORMAT_OF, to_hf_config
from internlm.model.hf_tensors import hf_tensors
from internlm.ops.cpu.kernel_start import choose_kernels

VOCAB = 8192
#: Sizes that families differ in; a window shorter than the sequences, or it would change nothing.
SPECIAL = {"MISTRAL": {"sliding_window": 256}, "GEMMA3": {"sliding_window": 256}}
OWN_FORMAT = [name for name, form in FORMAT_OF.items() if form != "llama"]


def decoder(family: str) -> Decoder:
    keys = {**LLAMA_30M, "vocab_size": VOCAB, **SPECIAL.get(family, {})}
    model = FamilyBuilder(FAMILIES[family])(ModelConfig(**keys))
    initialize_parameters(model, seed=1)
    return model


def ours(model: Decoder, ids: torch.Tensor) -> Callable[[], float]:
    labels = ids.roll(-1, 1)

    def step() -> float:
        loss = model(ids, labels=labels, grad_scale=1 / labels.numel()).loss_sum
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def theirs(model: Decoder, family: str, ids: torch.Tensor) -> Callable[[], float]:
    keys = to_hf_config(family, model.spec)
    config = CONFIG_MAPPING[keys["model_type"]](
        **keys, pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa"
    )
    peer = AutoModelForCausalLM.from_config(config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    peer.load_state_dict({row.name: row.of(weights[row.ours]) for row in hf_tensors(model.spec)}, strict=False)
    labels = ids.roll(-1, 1).flatten()

    def step() -> float:
        logits = peer(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        loss.backward()
        peer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def compare(family: str, rounds: int, sequences: int, length: int) -> tuple[float, float]:
    """Return the tokens per second of ours and of theirs."""
    ids = torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(1))
    model = decoder(family)
    sides = [ours(model, ids), theirs(model, family, ids)]
    one, other = (side() for side in sides)  # warm-up; the same loss, or they would not compute the same
    assert abs(one - other) < 1e-3 * other, (family, one, other)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, found in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            found.append(time.perf_counter() - start)
    return tuple(ids.numel() / median(found) for found in times)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=["LLAMA3", *OWN_FORMAT])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    choose_kernels(torch.float32)  # those that a run would have on this processor
    print(f"{processor.processor_name()}, one thread, float32, {given.sequences} sequences of {given.length} tokens")
    for family in given.families:
        one, other = compare(family, given.rounds, given.sequences, given.length)
        print(f"{family:10} {one:8.0f} against {other:8.0f} tokens/s: {one / other:.2f}", flush=True)


if __name__ == "__main__":
    main()
