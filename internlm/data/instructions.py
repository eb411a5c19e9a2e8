"""Samples for fine-tuning, from records with an instruction, an optional input, and the output to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from internlm.data.bad_rows import BadRows
from internlm.data.text_encoder import Sample
from internlm.data.text_files import TextFile
from internlm.data.texts import read_records, text_of
from internlm.utils.errors import ConfigError, Problem

INSTRUCTION, INPUT, OUTPUT = KEYS = ("instruction", "input", "output")
TODO = "Give each record an instruction, an output and, if needed, an input"

#: Place of the instruction in a template.
PLACEHOLDER = "{prompt}"
#: Template of prompts: the turns of the InternLM chat models.
TEMPLATE = "<|User|>:{prompt}\n<|Bot|>:"


def read_instructions(files: Iterable[TextFile], template: str, bad: BadRows) -> Iterator[Sample]:
    """Yield prompt and answer of each record of ``files``, in order.

    Args:
        files: Files of records.
        template: Text of a prompt, which contains :data:`PLACEHOLDER` once: the place of the instruction and, on the
            next line, its input.
        bad: Counter of bad rows.

    Raises:
        DataError: A file cannot be read, or a row is bad and is not skipped.
    """
    start, _, end = template.partition(PLACEHOLDER)
    for where, record in read_records(files, KEYS, bad, TODO):
        instruction = text_of(record, INSTRUCTION, where, bad, TODO)
        if instruction is None or (output := text_of(record, OUTPUT, where, bad, TODO)) is None:
            continue
        given = text_of(record, INPUT, where, bad, TODO, default="")
        if given is not None:
            # Not str.format: an instruction may contain braces.
            yield f"{start}{instruction}\n{given}{end}" if given.strip() else f"{start}{instruction}{end}", output


def check_template(template: str) -> str:
    r"""Return a template from the command line, in which ``\n`` is replaced by a line end.

    Raises:
        ConfigError: It does not contain :data:`PLACEHOLDER` once.
    """
    if (count := template.count(PLACEHOLDER)) != 1:
        message = f"expected {PLACEHOLDER} once, got it {count} times in {template!r}"
        raise ConfigError(Problem("--prompt-template", message, f"Pass a text such as {TEMPLATE!r}"))
    return template.replace("\\n", "\n")
