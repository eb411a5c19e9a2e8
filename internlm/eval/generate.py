"""Generation of text by sampling, for inspecting a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from internlm.accelerator import to_device
from internlm.core.parallel import ParallelEmbedding
from internlm.core.parallel.communicator import IDENTITY_MODEL
from internlm.core.parallel.param_state import has_placement, placement_of
from internlm.utils.errors import Problem, UserError


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int] | torch.Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Sample a continuation of ``prompt`` (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).

    Each new token takes a forward pass over the whole sequence, because there is no key-value cache. This is fast
    enough to inspect a model, but not to serve it. With ``parallel.zero1.fsdp`` every forward pass is collective, so
    all ranks must pass the same arguments.

    Args:
        model: Model that is not split over ranks or into chunks.
        prompt: Token ids of the prompt, at least one; a tensor has shape [number of tokens].
        new_tokens: Maximum number of tokens to sample.
        temperature: Divisor of the logits; 0 selects the most probable token.
        top_p: Sample from the smallest set of most probable tokens with at least this total probability.
        seed: Seed of the random generator.
        stop: Token id after which to stop. None: always sample ``new_tokens`` tokens.

    Returns:
        The sampled token ids, without the prompt, including ``stop`` if it was sampled.

    Raises:
        UserError: The model is split over ranks or into chunks, or an argument is out of its range.
    """
    _check_whole(model)
    tokens = _checked(prompt, _vocabulary(model))
    ranges = [("new_tokens", new_tokens, math.inf), ("temperature", temperature, math.inf), ("top_p", top_p, 1.0)]
    problems = [_out_of_range(name, value, largest) for name, value, largest in ranges if not 0 <= value <= largest]
    if problems:
        raise UserError(*problems)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(new_tokens):
        logits = model(to_device(torch.tensor([tokens]), device))[0, -1].float()  # [V]
        tokens.append(_draw(logits, temperature, top_p, generator))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def _checked(prompt: Sequence[int] | torch.Tensor, vocabulary: int | None) -> list[int]:
    """Return the token ids of ``prompt`` as a new list.

    Raises:
        UserError: ``prompt`` is empty, or has an id outside the ``vocabulary``.
    """
    if not len(prompt):
        todo = "Begin with at least one token, such as the tokenizer's start token"
        raise UserError(Problem("generate(prompt=…)", "is empty", todo))
    ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    for index, token in enumerate(ids):
        if not isinstance(token, (int, np.integer)) or not 0 <= token < (vocabulary or math.inf):
            expected = f"an id from 0 to {vocabulary - 1}" if vocabulary else "an id of at least 0"
            message = f"expected {expected} at index {index}, got {token!r}"
            raise UserError(Problem("generate(prompt=…)", message, "Use the tokenizer that the model was trained with"))
    return [int(token) for token in ids]


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of rows of the model's only embedding, or None if it has none, or several.

    One of several may embed positions, and nothing distinguishes it from that of the tokens.
    """
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, ParallelEmbedding))]
    return embeddings[0].weight.shape[0] if len(embeddings) == 1 else None


def _out_of_range(name: str, value: float, largest: float) -> Problem:
    limits = "at least 0" if largest == math.inf else f"from 0 to {largest:g}"
    return Problem(f"generate({name}=…)", f"must be {limits}, got {value}", "Correct the argument")


def _check_whole(model: nn.Module) -> None:
    """Raise a ``UserError`` if ``model`` is split over ranks or into pipeline chunks.

    Ranks that share a model would sample different tokens, and the first of several chunks returns no logits.
    """
    layers = getattr(model, "stage_layers", None)
    has_chunks = layers is not None and not (layers.is_whole and len(layers.chunks) == 1)
    is_parallel = getattr(model, "communicator", IDENTITY_MODEL) is not IDENTITY_MODEL
    is_sharded = any(has_placement(parameter) and placement_of(parameter).shard for parameter in model.parameters())
    if has_chunks or is_parallel or is_sharded:
        message = "expected a whole model, got one split over ranks or into chunks"
        todo = "Load the model's checkpoint in one process, with model.num_chunks=1"
        raise UserError(Problem("generate(model=…)", message, todo))


def _draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Sample one token id from ``logits`` [V]."""
    if temperature == 0:
        return int(logits.argmax())
    if logits.isnan().any():
        raise UserError(Problem("generate(model=…)", "its logits are NaN", "Check the checkpoint and the dtype"))
    probabilities, order = torch.softmax(logits / temperature, 0).sort(descending=True)
    outside = probabilities.cumsum(0) - probabilities >= top_p
    probabilities[1:][outside[1:]] = 0.0  # keep the most probable token for any top_p
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
