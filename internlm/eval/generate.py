"""Sampling continuations: enough to see what a model has learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from internlm.core.parallel.communicator import IDENTITY_MODEL
from internlm.utils.errors import Problem, UserError


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Up to ``new_tokens`` tokens after ``prompt``, drawn from the smallest set of tokens of total probability
    ``top_p`` (nucleus sampling, arXiv 1904.09751); ``temperature`` 0 takes the likeliest. Ends early with token
    ``stop``.

    The whole sequence is run again for every token: this is for looking at a model, not for serving it. Ranks that
    share its parameters (``parallel.zero1.fsdp``) must all ask for the same.
    """
    _demand_whole(model)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(prompt)
    for _ in range(new_tokens):
        logits = model(torch.tensor([tokens], device=device))[0, -1].float()  # [V]
        tokens.append(_draw(logits, temperature, top_p, generator))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def _demand_whole(model: nn.Module) -> None:
    """Raise :class:`UserError` where ``model`` is split over ranks, each of which would draw other tokens, or into
    chunks, the first of which has none to draw."""
    part = getattr(model, "stage_layers", None)
    in_parts = part is not None and not (part.is_whole and len(part.chunks) == 1)
    placements = [getattr(parameter, "placement", None) for parameter in model.parameters()]
    communicator = getattr(model, "communicator", IDENTITY_MODEL)
    if in_parts or communicator is not IDENTITY_MODEL or any(placement and placement.shard for placement in placements):
        todo = "Load its checkpoint into the same model on one process"
        raise UserError(Problem("generate", "the model is split over ranks or into chunks", todo))


def _draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, 0).sort(descending=True)
    outside = probabilities.cumsum(0) - probabilities >= top_p
    probabilities[1:][outside[1:]] = 0.0  # the likeliest stays, whatever top_p
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
