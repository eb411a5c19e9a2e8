"""One rank of ``internlm generate``: a model with the parameters of a checkpoint, and the texts that it continues."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from internlm.checkpoint.exchange import Exchange
from internlm.checkpoint.model_folders import folder_type
from internlm.checkpoint.model_loading import load_parameters
from internlm.cli.ckpt_output import printable
from internlm.cli.eval_rank import find_checkpoint
from internlm.cli.rank import join_ranks
from internlm.config import masked_dict
from internlm.core.context import global_context as gpc
from internlm.data.tokenizer import Tokenizer, load_tokenizer
from internlm.eval import stream
from internlm.initialize.launch import leave_at_exit
from internlm.train.build_model import create_model
from internlm.train.parallelize import initialize_model_and_parallel_communicator
from internlm.utils.errors import ConfigError, DataError, Problem, naming_lost_ranks

#: Character that decoders put for an incomplete sequence of bytes.
REPLACEMENT = "\ufffd"
#: Number of tokens after which the text before them is decoded no more.
_WINDOW = 32


def generate_rank(arguments: argparse.Namespace) -> None:
    """Continue the prompts of ``arguments``; rank 0 prints the texts.

    Raises:
        UserError: Something that the user can fix prevents the generation.
    """
    join_ranks(arguments)
    leave_at_exit()
    config, exchange = gpc.config, Exchange()
    # Before the model is built, which takes long for a large one.
    with exchange.failing_together():
        tokenizer = _tokenizer(arguments, config.data.tokenizer_path, config.model.vocab_size)
        prompts = _prompts(arguments)
        encoded = [_encode(tokenizer, prompt, arguments.bos) for prompt in prompts]
        stop = _stop_tokens(arguments, tokenizer)
    location = find_checkpoint(arguments.ckpt, exchange)
    with naming_lost_ranks():
        model = create_model(deferred=True, trains=False)
        model, _ = initialize_model_and_parallel_communicator(model, loads_all=True)
        load_parameters(model, location, masked_dict(config), exchange, config.ckpt.allow_model_changes)
        tokens = stream(
            model,
            encoded,
            arguments.max_new_tokens,
            stop=stop,
            batch_size=arguments.batch_size,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            # Otherwise equal prompts would have equal texts.
            seed=[arguments.seed + index for index in range(len(encoded))],
        )
        texts = [GrowingText(tokenizer, ids) for ids in encoded]
        _print(prompts, texts, tokens, prints=dist.get_rank() == 0)


def _print(prompts: list[str], texts: list[GrowingText], tokens: Iterator[tuple[int, int]], *, prints: bool) -> None:
    """Print a single text as it grows, several one after the other when all are complete."""
    alone = len(prompts) == 1 and prints
    if alone:
        _write(prompts[0])
    generated = ["" for _ in prompts]
    for index, token in tokens:  # on every rank: each step is collective
        new = texts[index].add(token)
        generated[index] += new
        if alone:
            _write(new)
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        rest = text.rest()
        if alone:
            _write(f"{rest}\n")
        elif prints:
            _write(f"--- prompt {index + 1}\n{prompt}{generated[index]}{rest}\n")


def _write(text: str) -> None:
    """Print ``text`` at once, with escapes for characters that could control the terminal."""
    parts = re.split(r"([\n\t])", text)
    sys.stdout.write("".join(part if part in ("\n", "\t") else printable(part) for part in parts))
    sys.stdout.flush()


class GrowingText:
    """Text of a prompt's continuation, decoded token by token.

    A character of several tokens is returned when its last token is known. Tokens are decoded along with some before
    them, because a tokenizer may drop the space before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt[-_WINDOW:]
        self._shown = self._decode()

    def add(self, token: int) -> str:
        """Append ``token`` and return the characters that are complete now."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT) or not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        if len(self._ids) > 2 * _WINDOW:
            self._ids = self._ids[-_WINDOW:]
            self._shown = self._decode()
        return new

    def rest(self) -> str:
        """Return the characters that are still incomplete."""
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        # A padded vocabulary has ids without a token, which an untrained model may choose.
        return self._tokenizer.decode([token for token in self._ids if token < self._tokenizer.vocab_size])


# -- arguments --------------------------------------------------------------------------------------------------------
def _tokenizer(arguments: argparse.Namespace, configured: str | None, vocab_size: int) -> Tokenizer:
    path, where = (configured, "data.tokenizer_path") if configured else (arguments.ckpt, "--ckpt")
    if arguments.tokenizer:
        path, where = arguments.tokenizer, "--tokenizer"
    elif not configured and folder_type(path) is None:  # a folder of other software has its own tokenizer
        raise ConfigError(Problem("--tokenizer", "is not given", "Pass it, or set data.tokenizer_path in the config"))
    tokenizer = load_tokenizer(path, parse_special_tokens=True)
    if tokenizer.vocab_size > vocab_size:
        message = f"{path} has ids up to {tokenizer.vocab_size - 1}, but model.vocab_size is {vocab_size}"
        raise DataError(Problem(where, message, "Use the tokenizer that the model was trained with"))
    return tokenizer


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line, then those of the file, one per line."""
    prompts, path = [*arguments.prompt], arguments.prompt_file
    if path is not None:
        try:
            # Not splitlines, which cuts at form feeds and Unicode's separators too; some editors begin with a mark.
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            message = f"{path} is not UTF-8 (byte {error.start})"
            raise DataError(Problem("--prompt-file", message, "Convert it to UTF-8")) from None
        except OSError as error:
            message = f"{path} cannot be read ({error.strerror or error})"
            raise DataError(Problem("--prompt-file", message, "Pass a text file with one prompt per line")) from None
        prompts += [line for line in lines if line.strip()]
    for prompt in prompts:
        _check_text("--prompt", prompt)
    if not prompts:
        message = "is not given" if path is None else f"{path} has no line with text"
        where = "--prompt" if path is None else "--prompt-file"
        raise ConfigError(Problem(where, message, 'Pass --prompt "TEXT", or --prompt-file FILE with a prompt per line'))
    return prompts


def _check_text(where: str, text: str) -> None:
    """Check that a text of the command line is one: Python puts surrogates for bytes that are not UTF-8.

    Raises:
        ConfigError: It is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(Problem(where, f"{text!r} is not UTF-8", "Convert it to UTF-8")) from None


def _encode(tokenizer: Tokenizer, prompt: str, begins_with_bos: bool) -> list[int]:
    ids = tokenizer.encode(prompt)
    if begins_with_bos:
        if tokenizer.bos_id is None:
            raise DataError(Problem("--bos", "the tokenizer has no bos token", "Remove --bos"))
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        todo = "Pass a text, or --bos if the model was trained on samples that begin with the bos token"
        raise ConfigError(Problem("--prompt", f"{prompt!r} has no tokens", todo))
    return ids


def _stop_tokens(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the stop tokens: those of ``--stop``, otherwise eos if the tokenizer has one."""
    if not arguments.stop:
        return [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stops, problems = [], []
    for text in arguments.stop:
        _check_text("--stop", text)
        is_id = text.isascii() and text.isdecimal()
        ids = [int(text)] if is_id else tokenizer.encode(text)
        stops += ids
        if is_id and ids[0] >= tokenizer.vocab_size:
            message = f"expected an id from 0 to {tokenizer.vocab_size - 1}, got {text}"
            problems.append(Problem("--stop", message, "Pass the id of a token"))
        elif len(ids) != 1:
            message = f"expected the text of one token, got {text!r} of {len(ids)} tokens"
            problems.append(Problem("--stop", message, "Pass the id or the name of a token, such as </s>"))
    if problems:
        raise ConfigError(*problems)
    return stops
