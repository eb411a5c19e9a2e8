"""Generation of text: continuations of prompts, greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import nn

from internlm.core.parallel import ParallelEmbedding
from internlm.core.parallel.communicator import IDENTITY, IDENTITY_HEAD, IDENTITY_MODEL
from internlm.core.parallel.linear import ParallelLinear
from internlm.core.parallel.param_state import has_placement, placement_of
from internlm.eval.next_logits import BatchRun, CachedDecoder, Precomputed, WholeSequences
from internlm.eval.sampling import NAN_TOKEN, Sampler, Sampling, SamplingOptions, out_of_range
from internlm.model.decoder import Decoder
from internlm.utils.errors import Problem, UserError
from internlm.utils.logger import get_logger

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

#: Largest number of tokens of a continuation, beyond any memory; numbers that are too large for a tensor are refused.
_MOST_TOKENS = 10**9
#: Token ids of one prompt.
Prompt = Sequence[int] | torch.Tensor | np.ndarray


@overload
def generate(
    model: nn.Module,
    prompt: Sequence[int] | torch.Tensor,
    new_tokens: int,
    *,
    stop: int | Iterable[int] | None = ...,
    batch_size: int = ...,
    **sampling: Unpack[SamplingOptions],
) -> list[int]: ...
@overload
def generate(
    model: nn.Module,
    prompt: Sequence[Prompt],
    new_tokens: int,
    *,
    stop: int | Iterable[int] | None = ...,
    batch_size: int = ...,
    **sampling: Unpack[SamplingOptions],
) -> list[list[int]]: ...
def generate(
    model: nn.Module,
    prompt: Prompt | Sequence[Prompt],
    new_tokens: int,
    *,
    stop: int | Iterable[int] | None = None,
    batch_size: int = 16,
    **sampling: Unpack[SamplingOptions],
) -> list[int] | list[list[int]]:
    """Generate a continuation of ``prompt``, or of each of several prompts.

    A continuation does not depend on the other prompts, apart from the rounding of products of other sizes. Built-in
    models keep the keys and values of earlier tokens in a cache; a model of your own runs the whole sequence for every
    token. All ranks that share a model, in any layout, must pass the same arguments, and each returns all tokens.

    Args:
        model: Model that returns logits, on the ranks that share it.
        prompt: Token ids of one prompt, or a list of prompts of any lengths; each has at least one token.
        new_tokens: Maximum number of tokens to generate for each prompt.
        stop: Token id after which to stop, or several. None: always generate ``new_tokens`` tokens.
        batch_size: Number of prompts that run together.
        sampling: Attributes of :class:`~internlm.eval.sampling.Sampling`: ``temperature`` (0: the most probable token,
            default 1), ``top_k``, ``top_p``, ``repetition_penalty``, and ``seed`` (of each prompt, default 0).

    Returns:
        The generated token ids, without the prompt, including the stop token; for a list of prompts, a list of these.

    Raises:
        UserError: The communicators of a split model are not attached, an argument is out of its range, or the logits
            are NaN.
    """
    prompts, is_single = _as_list(prompt)
    generated: list[list[int]] = [[] for _ in prompts]
    for index, token in stream(model, prompts, new_tokens, stop=stop, batch_size=batch_size, **sampling):
        generated[index].append(token)
    return generated[0] if is_single else generated


def stream(
    model: nn.Module,
    prompts: Sequence[Prompt],
    new_tokens: int,
    *,
    stop: int | Iterable[int] | None = None,
    batch_size: int = 16,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[tuple[int, int]]:
    """Generate continuations of ``prompts`` and yield each token when it is chosen.

    The arguments are those of :func:`generate`, with a list of prompts. All ranks that share a model must exhaust the
    iterator, or stop at the same token. The model is in evaluation mode until then.

    Yields:
        Index of the prompt, and the next token id of its continuation.

    Raises:
        UserError: As :func:`generate`.
    """
    _check_attached(model)
    vocabulary = _vocabulary(model)
    checked = [_checked(prompt, vocabulary) for prompt in prompts]
    problems = [
        *out_of_range("new_tokens", new_tokens, 0, _MOST_TOKENS),
        *out_of_range("batch_size", batch_size, 1, math.inf),
    ]
    if problems:
        raise UserError(*problems)
    options = Sampling(**sampling)
    options.check(len(checked))
    _warn_of_length(model, max(map(len, checked), default=0), new_tokens)
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    return _stream(model, checked, new_tokens, stops, options, batch_size)


@torch.no_grad()
def _stream(
    model: nn.Module, prompts: list[list[int]], new_tokens: int, stops: set[int], options: Sampling, batch_size: int
) -> Iterator[tuple[int, int]]:
    device, was_training = next(model.parameters()).device, model.training
    steps = new_tokens * math.ceil(len(prompts) / batch_size)
    precomputed = Precomputed(model, steps, min(len(prompts), batch_size)) if isinstance(model, Decoder) else None
    model.eval()
    try:
        for first in range(0, len(prompts) if new_tokens else 0, batch_size):
            batch = prompts[first : first + batch_size]
            seeds = [options.seed_of(first + index) for index in range(len(batch))]
            sampler = Sampler(options, batch, seeds, device)
            run: BatchRun
            if isinstance(model, Decoder) and precomputed is not None:
                run = CachedDecoder(model, batch, new_tokens, device, precomputed)
            else:
                run = WholeSequences(model, batch, device)
            for index, token in _batch(run, sampler, len(batch), new_tokens, stops):
                yield first + index, token
    finally:
        model.train(was_training)


def _batch(run: BatchRun, sampler: Sampler, count: int, new_tokens: int, stops: set[int]) -> Iterator[tuple[int, int]]:
    """Yield the tokens of one batch until each of its ``count`` sequences has stopped."""
    rows, finished = list(range(count)), set[int]()  # sequences of the run, and those that have stopped
    tokens: list[int] | None = None
    for _ in range(new_tokens):
        tokens = run.step(tokens, sampler.next_tokens)
        for index, token in zip(rows, tokens, strict=True):
            if index in finished:
                continue
            if token == NAN_TOKEN:
                message = "its logits are NaN"
                raise UserError(Problem("generate(model=…)", message, "Check the checkpoint and the dtype"))
            yield index, token
            if token in stops:
                finished.add(index)
        kept = [row for row, index in enumerate(rows) if index not in finished]
        if not kept:
            return
        if len(kept) < len(rows) and len(kept) <= run.kept_share * len(rows):
            run.keep(kept)
            sampler.keep(kept)
            rows, tokens = [rows[row] for row in kept], [tokens[row] for row in kept]


# -- checks -----------------------------------------------------------------------------------------------------------
def _as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[Sequence[Prompt], bool]:
    """Return a list of prompts, and whether ``prompt`` is a single one."""
    first = prompt[0] if len(prompt) else 0
    is_batch = isinstance(first, (Sequence, np.ndarray)) and not isinstance(first, str)
    if isinstance(first, torch.Tensor):
        is_batch = first.dim() > 0
    return (prompt, False) if is_batch else ([prompt], True)  # type: ignore[return-value,list-item]


def _checked(prompt: Prompt, vocabulary: int | None) -> list[int]:
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
    """Return the number of token ids of the model, or None if it is not known.

    That is the number of rows of a user's only embedding; of several, one may embed positions.
    """
    if isinstance(model, Decoder):
        return model.input_vocab_size
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, ParallelEmbedding))]
    return embeddings[0].weight.shape[0] if len(embeddings) == 1 else None


def _warn_of_length(model: nn.Module, longest: int, new_tokens: int) -> None:
    limit = model.spec.config.max_position_embeddings if isinstance(model, Decoder) else math.inf
    if longest + new_tokens > limit:
        lengths = f"a prompt of {longest} tokens and {new_tokens} new ones"
        get_logger().warning(f"generate: {lengths} may exceed model.max_position_embeddings={limit}")


def _check_attached(model: nn.Module) -> None:
    """Check that all ranks which share ``model`` take part in its forward pass.

    Raises:
        UserError: The communicators of a split model are not attached, or a user's own model is split.
    """
    layers, where = getattr(model, "stage_layers", None), "generate(model=…)"
    has_chunks = layers is not None and not (layers.is_whole and len(layers.chunks) == 1)
    is_parallel = getattr(model, "communicator", IDENTITY_MODEL) is not IDENTITY_MODEL
    is_sharded = any(has_placement(parameter) and placement_of(parameter).shard for parameter in model.parameters())
    if not isinstance(model, Decoder):
        if has_chunks or is_parallel or is_sharded:
            message = "expected a whole model, got one split over ranks or into chunks"
            todo = "Load the model's checkpoint in one process, with model.num_chunks=1"
            raise UserError(Problem(where, message, todo))
        return
    # A rank alone would compute its shard of every product, and return tokens without an error.
    linears = [module for module in model.modules() if isinstance(module, ParallelLinear)]
    alone = any(linear.communicator in (IDENTITY, IDENTITY_HEAD) for linear in linears)
    if (is_sharded and alone) or (not model.stage_layers.is_whole and model.pipeline.size == 1):
        todo = "Pass it through initialize_model_and_parallel_communicator first"
        raise UserError(Problem(where, "is split over ranks, but its communicators are not attached", todo))
