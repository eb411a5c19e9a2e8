"""Encoder of text samples as lines of a ``.bin`` file, in the processes that tokenize."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from internlm.data.sources import INPUT_ONLY_ZERO
from internlm.data.tokenizer import Tokenizer, load_tokenizer
from internlm.utils.errors import DataError, Problem
from internlm.utils.logger import get_logger

#: Prompt and text of a sample. The tokens of the prompt are inputs only; it is empty for plain text.
Sample: TypeAlias = tuple[str, str]


class Recipe(NamedTuple):
    """Recipe for converting texts into token ids: a tokenizer, and special tokens around each sample."""

    tokenizer_path: str
    before: tuple[int, ...]  # ids put before each sample
    after: tuple[int, ...]  # ids put after each sample
    parse_special_tokens: bool
    vocab_size: int  # exclusive upper bound of the token ids
    loses_line_ends: bool  # whether the tokenizer encodes a line end as a space, or drops it


class Chunk(NamedTuple):
    """Tokenized samples, encoded for the ``.bin`` and ``.meta`` files."""

    lines: bytes  # lines of the .bin file
    sizes: list[int]  # bytes of each line
    counts: list[int]  # tokens of each line
    text_bytes: int  # bytes of the texts and prompts, in UTF-8
    prompt_tokens: int  # tokens that are inputs only


def make_recipe(
    tokenizer_path: str, bos: bool | None = False, eos: bool | None = None, parse_special_tokens: bool = False
) -> Recipe:
    """Load a tokenizer, and select the special tokens to put around each sample.

    Args:
        tokenizer_path: Path that :func:`~internlm.data.tokenizer.load_tokenizer` accepts.
        bos: Put the bos token before each sample; None: only if the tokenizer has one.
        eos: Put the eos token after each sample; None: only if the tokenizer has one, with a warning otherwise.
        parse_special_tokens: Encode the name of a special token in a text as that token.

    Raises:
        DataError: The tokenizer cannot be read, or lacks a requested token.
    """
    tokenizer = load_tokenizer(tokenizer_path, parse_special_tokens)
    if eos is None and tokenizer.eos_id is None:
        message, todo = "has no eos token, so nothing marks where a text ends", "Name it in tokenizer_config.json"
        get_logger().warning(str(Problem(tokenizer_path, message, f"{todo} as eos_token, if texts should end with it")))
    before = _special(tokenizer_path, "bos", bos, tokenizer.bos_id)
    after = _special(tokenizer_path, "eos", eos, tokenizer.eos_id)
    # Compare ids rather than the decoded text: not every tokenizer.json has a decoder.
    without = [tokenizer.encode(text) for text in ("a b", "ab")]
    loses_line_ends = tokenizer.encode("a\nb") in without
    return Recipe(tokenizer_path, before, after, parse_special_tokens, tokenizer.vocab_size, loses_line_ends)


def _special(path: str, name: str, wanted: bool | None, token_id: int | None) -> tuple[int, ...]:
    if wanted and token_id is None:
        raise DataError(Problem(path, f"tokenizer has no {name} token", f"Omit --{name}"))
    return () if wanted is False or token_id is None else (token_id,)


def encode_chunk(recipe: Recipe, samples: Sequence[Sample]) -> Chunk:
    """Tokenize samples, and encode them for the ``.bin`` and ``.meta`` files."""
    tokenizer = _tokenizer(recipe.tokenizer_path, recipe.parse_special_tokens)
    prompts = [prompt for prompt, _ in samples]
    texts = [text for _, text in samples]
    encoded = tokenizer.encode_arrays(texts)
    # Prompt and text are encoded separately, since a token across their boundary would be in no prompt of an inference.
    nothing = np.empty(0, np.int32)
    heads = tokenizer.encode_arrays(prompts) if any(prompts) else [nothing] * len(samples)
    numbers = _numbers(recipe.vocab_size)
    before, after = _join([np.array(ids, np.int32) for ids in (recipe.before, recipe.after)], numbers)
    parts = zip(_join(heads, _input_only_numbers(recipe.vocab_size)), _join(encoded, numbers), strict=True)
    lines = [b'{"tokens":[' + (before + head + body + after)[:-1] + b"]}\n" for head, body in parts]
    around = len(recipe.before) + len(recipe.after)
    counts = [around + len(head) + len(ids) for head, ids in zip(heads, encoded, strict=True)]
    text_bytes = sum(len(text.encode()) for text in (*texts, *prompts))
    return Chunk(b"".join(lines), list(map(len, lines)), counts, text_bytes, sum(map(len, heads)))


def _join(samples: Sequence[np.ndarray], numbers: np.ndarray) -> list[bytes]:
    """Return the ids of each sample in decimal, each followed by a comma.

    Args:
        samples: Token ids of each sample.
        numbers: Text of each token id, padded with zero bytes to the same width.
    """
    # Twice as fast as the json module, which would take 10 % of the time of tokenizing: the table stays in the cache.
    counts = list(map(len, samples))
    joined = numbers[np.concatenate(samples)].tobytes()
    ends = accumulate((count * numbers.itemsize for count in counts), initial=0)
    return [joined[begin:end].translate(None, b"\0") for begin, end in pairwise(ends)]


@functools.cache
def _tokenizer(path: str, parse_special_tokens: bool) -> Tokenizer:
    """Load the tokenizer once per process, instead of pickling it with every chunk."""
    return load_tokenizer(path, parse_special_tokens)


@functools.cache
def _numbers(vocab_size: int) -> np.ndarray:
    """Return ``"ID,"`` for each token id, in 8 bytes: a load of an integer is faster than a copy of bytes."""
    return np.array([f"{i}," for i in range(vocab_size)], "S8").view(np.int64)


@functools.cache
def _input_only_numbers(vocab_size: int) -> np.ndarray:
    """Return ``"-ID,"`` for each token id, of tokens that are inputs only."""
    return np.array([f"{INPUT_ONLY_ZERO},", *(f"-{i}," for i in range(1, vocab_size))], bytes)
